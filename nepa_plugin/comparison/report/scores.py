"""The scores of a comparison: which there are, of which row, and in which order the rows stand."""

from collections.abc import Sequence
from statistics import mean

from nepa_plugin.comparison.plan import Run
from nepa_plugin.evaluation.readout import ReadoutRow, best_row

#: Poolings among which the best readout is looked for: those that every backbone has. Under causal attention the class
#: token sees only itself, so it is left out.
READOUT_POOLS = ("last", "mean", "concat")
#: Columns in the order of what they decide, and their headings.
COLUMNS = {
    "finetune": "fine-tuned",
    "finetune_causal": "fine-tuned, causal",
    "segmentation": "mIoU",
    "segmentation_frozen": "mIoU, frozen",
    "readout": "best readout",
    "linear": "linear",
    "attentive": "attentive",
    "knn": "kNN",
}
#: What the columns are called in a sentence.
NAMES = COLUMNS | {
    "finetune": "fine-tuning",
    "finetune_causal": "fine-tuning with causal attention",
    "segmentation": "the mean IoU of segmentation",
    "segmentation_frozen": "the mean IoU of segmentation with the backbone frozen",
    "readout": "the best frozen features",
    "linear": "the linear probe",
    "attentive": "the attentive probe",
}


def by_name(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs that did not fail by name, in order."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.error is None:
            groups.setdefault(run.name, []).append(run)
    return groups


def readout_rows(run: Run) -> list[ReadoutRow]:
    """Return the readout's rows among which the best is looked for."""
    rows = run.results.get("readout", {}).get("rows", [])
    return [ReadoutRow(**row) for row in rows if row["pool"] in READOUT_POOLS]


def best_readout(run: Run) -> tuple[float, str] | None:
    """Return the linear probe of a run's best feature, in per cent, and where in the network it was."""
    rows = readout_rows(run)
    if not rows:
        return None
    best = best_row(rows)
    return best.linear, f"{best.depth}, {best.pool}"


def metric(column: str) -> str:
    """Return what a column's scores are: ``top1`` or ``mIoU``."""
    return "mIoU" if column.startswith("segmentation") else "top1"


def score(run: Run, column: str) -> float | None:
    """Return a run's top-1 accuracy or mean IoU in per cent, or nothing where it was not scored so."""
    if column == "readout":
        best = best_readout(run)
        return best[0] if best else None
    value = run.results.get(column, {}).get(metric(column))
    return None if value is None else float(value)


def values(runs: Sequence[Run], column: str) -> dict[str, list[float]]:
    """Return the scores of each row that has some, by its name."""
    found = {name: [score(run, column) for run in group] for name, group in by_name(runs).items()}
    return {name: known for name, own in found.items() if (known := [value for value in own if value is not None])}


def columns(runs: Sequence[Run]) -> list[str]:
    """Return the columns that some row has."""
    return [column for column in COLUMNS if values(runs, column)]


def primary(runs: Sequence[Run]) -> str | None:
    """Return the column that decides: fine-tuning, or what there is of the others."""
    return next(iter(columns(runs)), None)


def order(runs: Sequence[Run]) -> list[str]:
    """Return the rows' names, the best by the column that decides first; rows without a score in it last."""
    column = primary(runs)
    own = values(runs, column) if column else {}
    names = list(by_name(runs))
    return sorted(names, key=lambda name: -mean(own[name]) if name in own else float("inf"))
