"""Where in a network the information is: kNN and linear probe at every depth."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table

from nepa_plugin.evaluation.features import POOLS, DepthFeatures
from nepa_plugin.evaluation.knn import knn_accuracy
from nepa_plugin.evaluation.linear import logistic_probe


@dataclass(frozen=True)
class ReadoutRow:
    """Accuracies in per cent of one depth and pooling."""

    depth: str
    pool: str
    knn: float
    linear: float


def readout(train: DepthFeatures, val: DepthFeatures, k: int = 20) -> list[ReadoutRow]:
    """Score every depth and pooling.

    Args:
        train: Features to fit on.
        val: Features to score, of the same model.
        k: Neighbours of kNN.

    Returns:
        A row per depth and pooling, from the input embedding to the final norm.
    """
    rows = []
    for depth, pools in train.features.items():
        for pool, features in pools.items():
            data = features, train.labels, val.features[depth][pool], val.labels
            rows.append(ReadoutRow(depth, pool, knn_accuracy(*data, k=k), logistic_probe(*data)))
    return rows


def readout_table(rows_by_model: Mapping[str, list[ReadoutRow]], title: str = "top-1 accuracy, %") -> Table:
    """Return one table: a row per depth; per model kNN and linear probe of the last token and of the mean.

    Args:
        rows_by_model: Results by the model's name.
        title: Of the table.

    Returns:
        A table for ``rich``; the best value of each column of a model is bold.
    """
    table = Table(title=title)
    table.add_column("depth")
    columns = [(model, pool, probe) for model in rows_by_model for pool in POOLS for probe in ("knn", "linear")]
    values: dict[tuple[str, str, str], dict[str, float]] = {c: {} for c in columns}
    for model, rows in rows_by_model.items():
        for row in rows:
            for probe in ("knn", "linear"):
                values[model, row.pool, probe][row.depth] = getattr(row, probe)
    for model, pool, probe in columns:
        table.add_column(f"{model}\n{pool}\n{probe}", justify="right")
    depths = list(dict.fromkeys(row.depth for rows in rows_by_model.values() for row in rows))
    for depth in depths:
        cells = []
        for column in columns:
            value = values[column].get(depth)
            best = value is not None and value == max(values[column].values())
            cells.append("" if value is None else f"[bold]{value:.1f}[/bold]" if best else f"{value:.1f}")
        table.add_row(depth, *cells)
    return table
