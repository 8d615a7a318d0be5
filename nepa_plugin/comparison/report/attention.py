"""The table of how the rows attend."""

from collections.abc import Sequence
from statistics import mean

from nepa_plugin.comparison.plan import Run
from nepa_plugin.comparison.report.methods import labels
from nepa_plugin.comparison.report.scores import by_name
from nepa_plugin.comparison.report.tables import Table


def attention_table(runs: Sequence[Run]) -> Table:
    """Return how each row attends in its first, middle and last layer; without rows where none was looked at."""
    called, rows = labels(runs), []
    for name, group in by_name(runs).items():
        found = [run.attention for run in group if run.attention]
        if not found:
            continue
        depth = len(next(iter(found[0].values())))
        layers = sorted({0, (depth - 1) // 2, depth - 1})
        cells = [called[name], ", ".join(str(layer + 1) for layer in layers)]
        for kind, digits in (("distance", 2), ("entropy", 2), ("outside", 3)):
            means = [mean(each[kind][layer] for each in found) for layer in layers]
            cells.append(", ".join(f"{value:.{digits}f}" for value in means))
        rows.append(cells)
    note = (
        "On some validation images, in the attention mode of pretraining, averaged over heads, images and seeds: the "
        "mean distance in patches of what a patch attends to, the entropy of its attention in nats, and the part of it "
        "that goes outside of the 3x3 patches around."
    )
    return Table("Attention", ["row", "layers", "distance", "entropy", "outside 3x3"], rows, note)
