"""Several rows of NEPA side by side: what their training shows, beside the paper's ablations."""

from collections.abc import Sequence
from statistics import mean

from matplotlib.figure import Figure

from nepa_plugin.comparison.plan import Run
from nepa_plugin.comparison.report.figures import empty_figure, finish, styles
from nepa_plugin.comparison.report.methods import labels
from nepa_plugin.comparison.report.tables import Table

#: What is logged of a run, its heading, and whether its largest value counts besides its last.
CURVES = {
    "train_loss": ("loss", False),
    "copy_baseline": ("loss of copying", False),
    "skill": ("skill", False),
    "grad_norm": ("gradient norm", True),
    "embedding_cosine": ("cosine of embeddings", False),
    "embedding_effective_rank": ("effective rank", False),
}
#: By the name of a config in ``lightly_configs/ablations``: ImageNet-1K top-1 of the paper (arXiv 2512.16922), ViT-B.
PUBLISHED = {
    "no_causal_mask": "73.6 after 50k steps; causal 76.8",
    "masked_40": "76.4 after 100k steps; without 78.2",
    "masked_60": "75.7 after 100k steps; without 78.2",
    "no_shift": "the loss is met by copying; fine-tuning diverges",
    "no_stop_gradient": "loss to -1, embeddings become identical",
}
#: Last logged values whose mean is shown.
LAST = 5


def _groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs of NEPA by name, failed ones too; empty unless there are several names."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.config.get("model", {}).get("class_path", "").rsplit(".", 1)[-1] == "NEPA":
            groups.setdefault(run.name, []).append(run)
    return groups if len(groups) > 1 else {}


def ablation_table(runs: Sequence[Run]) -> Table:
    """Return a row per name of what training logged last; without rows unless several of NEPA's are compared."""
    called, rows = labels(runs), []
    for name, group in _groups(runs).items():
        cells = [called.get(name, name)]
        for key, (_, largest) in CURVES.items():
            found = [[value for _, value in run.curves[key]] for run in group if run.curves.get(key)]
            last = f"{mean(mean(values[-LAST:]) for values in found):.3g}" if found else ""
            cells.append(f"{last} ({mean(map(max, found)):.3g})" if largest and found else last)
        failed = [run.error for run in group if run.error is not None]
        ended = f"{len(failed)} of {len(group)} failed: {failed[0]}" if failed else "to the end"
        rows.append([*cells, ended, PUBLISHED.get(name, "")])
    note = (
        f"The mean of the last {LAST} logged values and over the seeds; of the gradient's norm, before it is clipped, "
        "the largest in brackets. The skill is 0 where a patch is predicted as well as by copying the one before it, "
        "and 1 for a perfect prediction. A cosine near 1 and a rank near 1 are a collapse. The last column is the "
        "paper's, of ViT-B on ImageNet-1K, fine-tuned; it is not reproduced here."
    )
    header = ["row", *(heading for heading, _ in CURVES.values()), "trained", "published"]
    return Table("NEPA's rows in training", header, rows, note)


def plot_ablations(runs: Sequence[Run]) -> Figure | None:
    """Draw these curves, a panel each and a line per row, the mean over its seeds; nothing unless there are several."""
    groups, called, looks = _groups(runs), labels(runs), styles(runs)
    if not groups:
        return None
    figure = empty_figure(3.6 * len(CURVES), 3.6)
    panels = figure.subplots(1, len(CURVES))
    for axes, (key, (heading, _)) in zip(panels, CURVES.items(), strict=True):
        for name, group in groups.items():
            curves = [run.curves[key] for run in group if run.curves.get(key)]
            if curves:
                length = min(map(len, curves))
                means = [mean(points[k][1] for points in curves) for k in range(length)]
                look = {k: v for k, v in looks.get(name, {"linestyle": ":"}).items() if not k.startswith("marker")}
                axes.plot([step for step, _ in curves[0][:length]], means, label=called.get(name, name), **look)
        axes.set(title=heading, xlabel="optimizer step")
        axes.grid(alpha=0.3)
        if key == "grad_norm":
            axes.set_yscale("log")
    finish(panels[-1])
    return figure
