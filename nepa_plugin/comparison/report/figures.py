"""The plots of a comparison."""

from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from nepa_plugin.comparison.plan import Run
from nepa_plugin.comparison.report.costs import compute_unit, finetuning_pflop, training_pflop
from nepa_plugin.comparison.report.methods import NEXT, WHOLE, is_untrained, labels, paper_of
from nepa_plugin.comparison.report.scores import COLUMNS, by_name, columns, metric, order, primary, score, values
from nepa_plugin.comparison.report.statistics import Noise


def styles(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Return how each row is drawn, by its name: NEPA in black, if it is one row, and fresh weights in grey."""
    found: dict[str, dict[str, Any]] = {}
    ours = {name for name, group in by_name(runs).items() if group[0].summary.get("method") == "NEPA"}
    for i, (name, group) in enumerate(by_name(runs).items()):
        if is_untrained(group[0]):
            found[name] = {"color": "0.6", "linestyle": ("--", ":", "-.")[i % 3], "linewidth": 1}
            continue
        own = ours == {name}
        found[name] = {
            "color": "black" if own else f"C{(0, 1, 2, 3, 4, 5, 6, 8, 9)[i % 9]}",  # C7 is grey
            "linewidth": 2.4 if own else 1.2,
            "linestyle": "-" if i < 9 else "--",
            "marker": "osv^D<>pPX*h"[i % 12],
            "markersize": 4,
        }
    return found


def empty_figure(width: float, height: float) -> Figure:
    """Return a figure of a size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def curve(run: Run, name: str) -> tuple[list[float], list[float]]:
    """Return what a run logged under a name: images seen, and the values."""
    points = run.curves.get(name, [])
    per_step = run.summary["images_seen"] / max(1, run.summary["steps"])
    return [(step + 1) * per_step for step, _ in points], [value for _, value in points]


def plot_scores(runs: Sequence[Run]) -> Figure:
    """Draw the column that decides: a row's mean, its interval, and its seeds, the best at the top."""
    column, called, looks = primary(runs), labels(runs), styles(runs)
    own = values(runs, column) if column else {}
    names = [name for name in order(runs) if name in own]
    noise = Noise.of(own)
    figure = empty_figure(7.5, 0.8 + 0.34 * max(1, len(names)))
    axes = figure.add_subplot()
    for place, name in enumerate(names):
        mean = sum(own[name]) / len(own[name])
        colour = looks[name]["color"]
        axes.errorbar(mean, place, xerr=noise.half_width(len(own[name])), fmt="o", color=colour, capsize=3)
        axes.plot(own[name], [place] * len(own[name]), "|", color=colour, markersize=9, alpha=0.7)
    axes.set_yticks(range(len(names)), [called[name] for name in names])
    axes.invert_yaxis()
    what = ""
    if column:  # the columns of segmentation have mIoU in their names
        what = f"{COLUMNS[column]}, %" if metric(column) == "mIoU" else f"{COLUMNS[column]}, top-1 %"
    axes.set_xlabel(f"{what}: mean, 95 % interval, each seed" if noise.freedom else what)
    axes.grid(alpha=0.3, axis="x")
    return figure


def plot_losses(runs: Sequence[Run]) -> Figure:
    """Draw the training loss of each method in its own panel, a line per seed: the losses have different units."""
    called = labels(runs)
    groups = {called[name]: group for name, group in by_name(runs).items() if group[0].trained}
    columns = min(4, max(1, len(groups)))
    rows = -(-len(groups) // columns) or 1
    figure = empty_figure(2.7 * columns, 2.1 * rows)
    for i, (name, group) in enumerate(groups.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        for run in group:
            axes.plot(*curve(run, "train_loss"), linewidth=1)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    figure.supxlabel("images seen", fontsize=9)
    figure.supylabel("training loss", fontsize=9)
    return figure


def plot_online_probe(runs: Sequence[Run]) -> Figure:
    """Draw the online probe's validation accuracy against images seen, the mean over seeds."""
    figure, called, looks = empty_figure(7.5, 4), labels(runs), styles(runs)
    axes = figure.add_subplot()
    for name, group in by_name(runs).items():
        curves = [curve(run, "val_online_cls_top1") for run in group if run.trained]
        curves = [one for one in curves if one[0]]
        if curves:
            length = min(len(x) for x, _ in curves)
            mean = [100 * sum(y[k] for _, y in curves) / len(curves) for k in range(length)]
            axes.plot(curves[0][0][:length], mean, label=called[name], **looks[name])
    axes.set(xlabel="images seen", ylabel="online probe, top-1 %")
    finish(axes)
    return figure


def plot_readout(runs: Sequence[Run], pool: str = "mean") -> Figure:
    """Draw the linear readout at every depth, the mean over seeds, in a panel per kind of method."""
    called, looks, groups = labels(runs), styles(runs), by_name(runs)
    lines: dict[str, dict[str, float]] = {}
    for name, group in groups.items():
        found: dict[str, list[float]] = {}
        for run in group:
            for row in run.results.get("readout", {}).get("rows", []):
                if row["pool"] == pool:
                    found.setdefault(row["depth"], []).append(row["linear"])
        if found:
            lines[name] = {depth: sum(v) / len(v) for depth, v in found.items()}
    families: dict[str, list[str]] = {}
    for name in lines:
        if not is_untrained(groups[name][0]):
            paper = paper_of(groups[name][0])
            families.setdefault(paper.family if paper else "others", []).append(name)
    floors = [name for name in lines if is_untrained(groups[name][0])]
    panels = sorted(families, key=lambda family: (family != NEXT, family == WHOLE, family)) or ["untrained"]
    figure = empty_figure(1.2 + 3.1 * len(panels), 5.8)
    for i, (family, axes) in enumerate(
        zip(panels, figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], strict=True)
    ):
        for name in [*families.get(family, []), *floors]:
            axes.plot(list(lines[name]), list(lines[name].values()), label=called[name], **looks[name])
        axes.set_title(family, fontsize=10)
        axes.tick_params(axis="x", labelsize=8, rotation=45)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.24))  # lines end anywhere
        if not i:
            what = "mean of the patch tokens" if pool == "mean" else f"{pool} token"
            axes.set_ylabel(f"linear probe of the {what}, top-1 %", fontsize=8)
    return figure


def plot_compute(runs: Sequence[Run]) -> Figure:
    """Draw each column's accuracy against operations and against time, fine-tuning's own included, a point per seed."""
    shown, called, looks = columns(runs), labels(runs), styles(runs)
    unit, factor = compute_unit(runs)
    figure = empty_figure(3.4 * max(1, len(shown)), 7.2)
    grid = figure.subplots(2, max(1, len(shown)), squeeze=False)
    for column, (compute, time) in zip(shown, grid.T, strict=False):
        tuned = column == "finetune"
        for name, group in by_name(runs).items():
            if not group[0].trained:
                continue
            style = {k: v for k, v in looks[name].items() if k in ("color", "marker")}
            for axes, cost in ((compute, _operations), (time, _seconds)):
                pairs = [(cost(run, tuned), score(run, column)) for run in group]
                points = [(factor * x if axes is compute else x, y) for x, y in pairs if x and y is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), linestyle="none", markersize=7, label=called[name], **style)
        stage = "pretraining and fine-tuning" if tuned else "pretraining"
        compute.set(xlabel=f"{stage}, {unit}", title=COLUMNS[column])
        time.set(xlabel=f"{stage}, s")
        for axes in (compute, time):
            axes.set_xscale("log")
            for axis_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
                axis_formatter(_PlainLogFormatter(minor_thresholds=(1.5, 0.5)))
            axes.grid(alpha=0.3, which="both")
            axes.tick_params(axis="x", which="both", labelsize=8)
    if shown:
        for row in grid:
            row[0].set_ylabel("%")
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    return figure


class _PlainLogFormatter(LogFormatter):
    """matplotlib's choice of which ticks are written, written as 0.3 and 3 instead of 3e-01 and 3 x 10^0."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _operations(run: Run, tuned: bool) -> float | None:
    before, after = training_pflop(run), finetuning_pflop(run) if tuned else 0.0
    return None if before is None or after is None else before + after


def _seconds(run: Run, tuned: bool) -> float | None:
    after = run.results.get("finetune", {}).get("seconds") if tuned else 0.0
    return None if after is None else float(run.summary["seconds"] + after)


def finish(axes: Any) -> None:
    """Add a grid, and the legend beside the panel."""
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
