"""The plots of a comparison."""

from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from nepa_plugin.comparison.plan import Run
from nepa_plugin.comparison.report.tables import PROTOCOLS, by_name, compute_unit, score, training_pflop


def _style(index: int, name: str) -> dict[str, Any]:
    if "untrained" in name:
        return {"color": "0.6", "linestyle": ("--", ":", "-.")[index % 3], "linewidth": 1}
    own = name.startswith("nepa")
    markers = "osv^D<>pPX*h"
    return {
        "color": "black" if own else f"C{index % 10}",
        "linewidth": 2.4 if own else 1.2,
        "marker": markers[index % len(markers)],
        "markersize": 4,
    }


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _curve(run: Run, name: str) -> tuple[list[float], list[float]]:
    points = run.curves.get(name, [])
    per_step = run.summary["images_seen"] / max(1, run.summary["steps"])
    return [(step + 1) * per_step for step, _ in points], [value for _, value in points]


def plot_losses(runs: Sequence[Run]) -> Figure:
    """Draw the training loss of each method in its own panel, a line per seed: the losses have different units."""
    groups = {name: group for name, group in by_name(runs).items() if group[0].trained}
    columns = min(4, max(1, len(groups)))
    rows = -(-len(groups) // columns) or 1
    figure = _figure(2.7 * columns, 2.1 * rows)
    for i, (name, group) in enumerate(groups.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        for run in group:
            axes.plot(*_curve(run, "train_loss"), linewidth=1)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    figure.supxlabel("images seen", fontsize=9)
    figure.supylabel("training loss", fontsize=9)
    return figure


def plot_online_probe(runs: Sequence[Run]) -> Figure:
    """Draw the online probe's validation accuracy against images seen, the mean over seeds."""
    figure = _figure(7.5, 4)
    axes = figure.add_subplot()
    for i, (name, group) in enumerate(by_name(runs).items()):
        curves = [_curve(run, "val_online_cls_top1") for run in group if run.trained]
        curves = [curve for curve in curves if curve[0]]
        if curves:
            length = min(len(x) for x, _ in curves)
            mean = [100 * sum(y[k] for _, y in curves) / len(curves) for k in range(length)]
            axes.plot(curves[0][0][:length], mean, label=name, **_style(i, name))
    axes.set(xlabel="images seen", ylabel="online probe, top-1 %")
    _finish(axes)
    return figure


def plot_readout(runs: Sequence[Run], pool: str = "mean") -> Figure:
    """Draw the linear readout at every depth, the mean over seeds."""
    figure = _figure(7.5, 4)
    axes = figure.add_subplot()
    for i, (name, group) in enumerate(by_name(runs).items()):
        values: dict[str, list[float]] = {}
        for run in group:
            for row in run.results.get("readout", {}).get("rows", []):
                if row["pool"] == pool:
                    values.setdefault(row["depth"], []).append(row["linear"])
        if values:
            axes.plot(list(values), [sum(v) / len(v) for v in values.values()], label=name, **_style(i, name))
    what = "mean of the patch tokens" if pool == "mean" else f"{pool} token"
    axes.set(ylabel=f"linear probe of the {what}, top-1 %")
    axes.tick_params(axis="x", labelsize=8, rotation=30 if len(axes.get_xticks()) > 8 else 0)
    _finish(axes)
    return figure


def plot_compute(runs: Sequence[Run]) -> Figure:
    """Draw each protocol's accuracy against the training's floating-point operations, a point per seed."""
    protocols = [p for p in (*PROTOCOLS, "readout") if any(score(run, p) is not None for run in runs)]
    unit, factor = compute_unit(runs)
    figure = _figure(3.8 * max(1, len(protocols)), 4.2)
    panels = [figure.add_subplot(1, len(protocols), i + 1) for i in range(len(protocols))]
    for axes, protocol in zip(panels, protocols, strict=True):
        for i, (name, group) in enumerate(by_name(runs).items()):
            pairs = [(training_pflop(run), score(run, protocol)) for run in group]
            points = [(factor * x, y) for x, y in pairs if x and y is not None]
            style = {k: v for k, v in _style(i, name).items() if k in ("color", "marker")}
            if points:
                axes.plot(*zip(*points, strict=True), linestyle="none", markersize=7, label=name, **style)
        axes.set(xscale="log", xlabel=f"training, {unit}", title=PROTOCOLS.get(protocol, "best readout"))
        for axis_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            axis_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))  # 3, not 3 x 10^0
        axes.grid(alpha=0.3, which="both")
    if panels:
        panels[0].set_ylabel("top-1 %")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    return figure


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
