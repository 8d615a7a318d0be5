"""The table of what a search found."""

from typing import Any

from nepa_plugin.comparison.report.tables import Table
from nepa_plugin.comparison.search import Search, describe


def search_table(found: Search) -> Table:
    """Return a row per config: the options that were chosen, and what they reached beside the config as it is."""
    header = ["config", "chosen", "as it is, %", "chosen, %", "worst, %"]
    rows = []
    for name, trials in found.trials.items():
        best = found.best(name)
        scores = [trial.top1 for trial in trials if trial.top1 is not None]
        chosen = ", ".join(f"{key} {_text(value)}" for key, value in best.options.items()) or "the config as it is"
        rows.append([name, chosen, _score(trials[0].top1), _score(best.top1), _score(min(scores))])
    return Table("Search", header, rows, describe(found))


def _score(value: float | None) -> str:
    return "failed" if value is None else f"{value:.1f}"


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
