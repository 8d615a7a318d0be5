"""Where in a network the information is: kNN and linear probe at every depth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from nepa_plugin.evaluation.features import DepthFeatures, concat_depth
from nepa_plugin.evaluation.knn import knn_accuracy
from nepa_plugin.evaluation.linear import logistic_probe

PROBES = ("knn", "linear")


@dataclass(frozen=True)
class ReadoutRow:
    """Accuracies in per cent of one depth and pooling.

    Attributes:
        depth: Of the features.
        pool: Of the features.
        knn: Of kNN on the validation images.
        linear: Of the linear probe on the validation images.
        held_out: Of a linear probe of four fifths of the training images on the other fifth, by which the best feature
            is chosen; nothing where it was not looked at.
    """

    depth: str
    pool: str
    knn: float
    linear: float
    held_out: float | None = None


def best_row(rows: Sequence[ReadoutRow]) -> ReadoutRow:
    """Return the best row: on the held-out training images where all rows were scored on them.

    Otherwise it is the best on the validation images, which is an optimistic number.
    """
    return max(rows, key=lambda row: row.held_out if chosen_held_out(rows) else row.linear)  # type: ignore[arg-type, return-value]


def chosen_held_out(rows: Sequence[ReadoutRow]) -> bool:
    """Whether :func:`best_row` chooses on held-out training images."""
    return all(row.held_out is not None for row in rows)


#: One of so many training images of a class is held out.
FOLDS = 5


def hold_out(labels: Tensor) -> Tensor | None:
    """Return a mask (N,) of every fifth image of each class, or nothing where a class has fewer than five."""
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        places = (labels == label).nonzero().flatten()
        if len(places) < FOLDS:
            return None
        held[places[FOLDS - 1 :: FOLDS]] = True
    return held


def readout(
    train: DepthFeatures,
    val: DepthFeatures,
    k: int = 20,
    temperature: float = 0.1,
    C: float = 1.0,
    concat: int = 0,
    device: str | torch.device = "cpu",
) -> list[ReadoutRow]:
    """Score every depth and pooling.

    Args:
        train: Features to fit on.
        val: Features to score, of the same model.
        k: Neighbours of kNN.
        temperature: Of kNN's votes.
        C: Inverse strength of the linear probe's penalty.
        concat: Score :func:`concat_depths` of so many depths, too, of which one at a time is put together.
        device: Where kNN computes similarities.

    Returns:
        A row per depth and pooling, from the input embedding to the final norm.
    """
    rows, held = [], hold_out(train.labels)
    for depth, pools in train.features.items():
        for pool in [*pools, *(["concat"] if concat else [])]:
            fit, score = (
                concat_depth(part, depth, concat) if pool == "concat" and concat else part.features[depth][pool]
                for part in (train, val)
            )
            data = fit, train.labels, score, val.labels
            knn = knn_accuracy(*data, k=k, temperature=temperature, device=device)
            held_out = None
            if held is not None:
                held_out = logistic_probe(fit[~held], train.labels[~held], fit[held], train.labels[held], C=C)
            rows.append(ReadoutRow(depth, pool, knn, logistic_probe(*data, C=C), held_out))
    return rows


def readout_table(rows_by_model: Mapping[str, list[ReadoutRow]], title: str = "top-1 accuracy, %") -> Table:
    """Return one table: a row per depth; per model and pooling a column of kNN and one of the linear probe.

    Args:
        rows_by_model: Results by the model's name.
        title: Of the table.

    Returns:
        A table for ``rich``; the best value of each column is bold.
    """
    table = Table(title=title)
    table.add_column("depth")
    values: dict[tuple[str, str, str], dict[str, float]] = {}
    for model, rows in rows_by_model.items():
        pools = dict.fromkeys(row.pool for row in rows)
        values |= {(model, pool, probe): {} for pool in pools for probe in PROBES}
        for row in rows:
            for probe in PROBES:
                values[model, row.pool, probe][row.depth] = getattr(row, probe)
    for model, pool, probe in values:
        table.add_column(f"{model}\n{pool}\n{probe}", justify="right")
    depths = list(dict.fromkeys(row.depth for rows in rows_by_model.values() for row in rows))
    for depth in depths:
        cells = []
        for column in values.values():
            value = column.get(depth)
            best = value is not None and value == max(column.values())
            cells.append("" if value is None else f"[bold]{value:.1f}[/bold]" if best else f"{value:.1f}")
        table.add_row(depth, *cells)
    return table


def readout_figure(rows_by_model: Mapping[str, list[ReadoutRow]], path: str | Path) -> None:
    """Draw accuracy over depth, kNN and linear probe side by side, a line per model and pooling.

    Args:
        rows_by_model: Results by the model's name; the first is drawn with full lines.
        path: The PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    styles = ["-", "--", ":"]
    for axis, probe in zip(axes, PROBES, strict=True):
        for i, (model, rows) in enumerate(rows_by_model.items()):
            for j, pool in enumerate(dict.fromkeys(row.pool for row in rows)):
                line = {row.depth: getattr(row, probe) for row in rows if row.pool == pool}
                label = f"{model}, {pool}" if len(rows_by_model) > 1 else pool
                style = {"linestyle": styles[i % 3], "color": f"C{j}", "marker": "o", "markersize": 3}
                axis.plot(list(line), list(line.values()), label=label, **style)
        axis.set_title({"knn": "kNN", "linear": "linear probe"}[probe])
        axis.tick_params(axis="x", rotation=45)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("top-1 accuracy, %")
    # Beside the axes: the lines end anywhere between chance and 100 %, so no corner is free of them.
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside right center", fontsize="small", frameon=False)
    figure.savefig(path, dpi=120)
