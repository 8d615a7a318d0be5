"""The answer of a comparison, in sentences."""

from collections.abc import Sequence
from statistics import mean

from nepa_plugin.comparison.plan import Run
from nepa_plugin.comparison.report.methods import is_untrained, labels
from nepa_plugin.comparison.report.scores import NAMES, by_name, order, primary, values
from nepa_plugin.comparison.report.statistics import Noise

#: Up to so many rows of NEPA have a sentence each; of more, as in an ablation, the first is what the others are beside.
MOST = 2


def verdict(runs: Sequence[Run]) -> list[str]:
    """Return which rows are ahead by more than noise, where NEPA stands, and what training from scratch reaches.

    Args:
        runs: All runs.

    Returns:
        Sentences; none where nothing was scored.
    """
    column = primary(runs)
    if column is None:
        return []
    rows = values(runs, column)
    noise = Noise.of(rows)
    called = labels(runs)
    names = [name for name in order(runs) if name in rows]
    trained = [name for name in names if not is_untrained(by_name(runs)[name][0])]
    floors = [name for name in names if name not in trained]
    if not trained:
        return []
    best, *others = trained
    place = f" is first of {len(trained)}" if others else ", the only trained row,"
    said = [f"{called[best]}{place} by {NAMES[column]}: {mean(rows[best]):.1f} %."]
    if not noise.freedom:
        said.append("With one seed per row, nothing tells how much of a difference is noise.")
    elif others:
        level = [called[name] for name in others if not noise.separates(rows[best], rows[name])]
        if level:
            said.append(f"Within the seeds' noise of it: {', '.join(level)}.")
        else:
            said.append("It is ahead of every other row by more than the seeds' noise.")
    nepa = [name for name in dict.fromkeys(run.name for run in runs) if name in trained and _is_nepa(runs, name)]
    variants = len(nepa) > MOST
    for name in nepa[:1] if variants else [name for name in others if name in nepa]:
        if name == best:
            continue
        line = f"{called[name]} is number {1 + trained.index(name)}, "
        line += f"{mean(rows[best]) - mean(rows[name]):.1f} points behind"
        if noise.freedom:
            line += f", which is {'more than' if noise.separates(rows[best], rows[name]) else 'within the'} noise"
        said.append(f"{line}.")
    if variants and noise.freedom:
        base = rows[nepa[0]]
        clear = [name for name in nepa[1:] if noise.separates(rows[name], base)]
        above, below = ([called[n] for n in clear if (mean(rows[n]) > mean(base)) is up] for up in (True, False))
        said.append(
            f"Of NEPA's other rows, by more than noise ahead of {called[nepa[0]]}, the first given: "
            f"{', '.join(above) or 'none'}; behind it: {', '.join(below) or 'none'}."
        )
    if floors:
        floor = floors[0]
        ahead = [name for name in trained if mean(rows[name]) > mean(rows[floor])]
        clear = [name for name in ahead if noise.separates(rows[name], rows[floor])]
        line = f"{'From scratch' if column == 'finetune' else 'Untrained'}, the best network reaches "
        line += f"{mean(rows[floor]):.1f} %: {len(ahead)} of {len(trained)} are above it"
        if noise.freedom:
            line += f", {len(clear) or 'none'} by more than noise"
        said.append(f"{line}.")
    return said


def _is_nepa(runs: Sequence[Run], name: str) -> bool:
    return bool(by_name(runs)[name][0].summary.get("method") == "NEPA")
