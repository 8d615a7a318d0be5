"""The table of accuracies, and what a table is."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import rich.table
from rich.text import Text

from nepa_plugin.comparison.plan import Run
from nepa_plugin.comparison.report.methods import is_untrained, labels
from nepa_plugin.comparison.report.scores import COLUMNS, best_readout, by_name, columns, order, readout_rows, values
from nepa_plugin.comparison.report.statistics import Noise
from nepa_plugin.evaluation.readout import chosen_held_out


@dataclass(frozen=True)
class Table:
    """A table of text cells under a heading, with a note below it.

    Attributes:
        heading: Above it.
        header: Titles of the columns.
        rows: The cells.
        note: Below it.
        best: Cells (row, column) that are the best of their column.
    """

    heading: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""
    best: frozenset[tuple[int, int]] = frozenset()

    def as_rich(self) -> rich.table.Table:
        """Return it for the terminal."""
        table = rich.table.Table(title=Text(self.heading), caption=Text(self.note))
        for i, title in enumerate(self.header):
            table.add_column(Text(title), justify="right" if i else "left")
        for i, row in enumerate(self.rows):  # names may look like markup, so none is read
            table.add_row(*(Text(cell, "bold" if (i, j) in self.best else "") for j, cell in enumerate(row)))
        return table


def accuracy_table(runs: Sequence[Run]) -> Table:
    """Return top-1 accuracies per row of the comparison, the best first, with intervals over the seeds."""
    shown, called, groups = columns(runs), labels(runs), by_name(runs)
    names = order(runs)
    noises = {column: Noise.of(values(runs, column)) for column in shown}
    header, cells = ["method", "seeds"], {name: [called[name], str(len(groups[name]))] for name in names}
    best: set[tuple[int, int]] = set()
    for column in shown:
        own = values(runs, column)
        means = {name: f"{mean(own[name]):.1f}" for name in names if name in own}
        highest = max(means.values(), key=float, default="")
        best |= {(i, len(header)) for i, name in enumerate(names) if means.get(name) == highest}
        header.append(COLUMNS[column])
        for name in names:
            half = noises[column].half_width(len(own[name])) if name in own else None
            cells[name].append(means.get(name, "") + (f" ± {half:.1f}" if half is not None else ""))
        if column == "readout":
            header.append("where")
            for name in names:
                places = [found[1] for run in groups[name] if (found := best_readout(run))]
                cells[name].append("; ".join(dict.fromkeys(places)))
    return Table("Accuracy", header, [cells[name] for name in names], _accuracy_note(runs, noises), frozenset(best))


def _accuracy_note(runs: Sequence[Run], noises: dict[str, Noise]) -> str:
    note = "Top-1 accuracy on the validation images in per cent"
    if any(noise.freedom for noise in noises.values()):
        note += (
            ": the mean over seeds, and half the width of its 95 % t interval, with the seeds' deviation pooled over "
            "the rows of the column. It says how much another seed changes, not how much other images would"
        )
    note += "."
    if any(run.results.get("readout") for run in runs):
        note += (
            " The best readout is the linear probe of the best of all depths and of the last token, the mean of the "
            "patch tokens, and the means of the last depths put side by side (concat). "
        )
        if all(chosen_held_out(readout_rows(run)) for run in runs if run.results.get("readout")):
            note += "It is chosen on a fifth of the training images, held out for that, in each run."
        else:
            note += "It is chosen on the validation images, for some rows at least, so it is an optimistic number."
    if any("segmentation" in run.results for run in runs):
        note += (
            " Mean IoU in per cent on the validation images of the segmentation config, with a head of one convolution "
            "on four depths: the whole network trained, and with the backbone frozen."
        )
    if any("finetune" in run.results for run in runs if is_untrained(run)):
        note += " Fine-tuned, an untrained row is the same network trained from scratch."
    return note
