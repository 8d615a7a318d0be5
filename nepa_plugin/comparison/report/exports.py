"""The numbers of a comparison for other programs: a tidy CSV, and tables for LaTeX."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from nepa_plugin.comparison.plan import Run
from nepa_plugin.comparison.report.costs import training_pflop
from nepa_plugin.comparison.report.methods import paper_of
from nepa_plugin.comparison.report.scores import COLUMNS, best_readout, metric, score
from nepa_plugin.comparison.report.tables import Table

COSTS = (
    *("epochs", "images_seen", "seconds", "images_per_second", "peak_memory_bytes", "views", "encoder_passes"),
    *("encoder_tokens", "gflops", "backbone_parameters", "discarded_parameters"),
)


def write_csv(runs: Sequence[Run], path: Path) -> None:
    """Write a row per run and protocol: the score, where in the network it was read, and the run's cost.

    A run that failed has one row, with its error.
    """
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        head = ["row", "method", "seed", "protocol", "metric", "score", "where", "evaluation_seconds"]
        writer.writerow([*head, *COSTS, "training_pflop", "error"])
        for run in runs:
            paper = paper_of(run)
            about = [run.name, paper.label if paper else "", run.seed]
            cost = [*(run.summary.get(key, "") for key in COSTS), training_pflop(run), run.error or ""]
            scored = [column for column in COLUMNS if score(run, column) is not None]
            for column in scored if run.error is None else []:
                best = best_readout(run) if column == "readout" else None
                seconds = run.results[column].get("seconds", "")
                writer.writerow(
                    [*about, column, metric(column), score(run, column), best[1] if best else "", seconds, *cost]
                )
            if run.error is not None or not scored:
                writer.writerow([*about, "", "", "", "", "", *cost])


_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
_SPECIAL |= {character: f"\\{character}" for character in "&%$#_{}"}


def latex(text: str) -> str:
    """Return text as LaTeX that shows it as it is."""
    return re.sub(r"[\\~^±&%$#_{}]", lambda found: _SPECIAL[found[0]], " ".join(text.split()))


def latex_table(table: Table) -> str:
    """Return a table for a paper, with the packages booktabs' rules and the best cells in bold."""
    lines = [
        f"% {' '.join(table.heading.split())}",
        rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
        r"\toprule",
    ]
    lines += [" & ".join(map(latex, table.header)) + r" \\", r"\midrule"]
    for i, row in enumerate(table.rows):
        cells = [rf"\textbf{{{latex(cell)}}}" if (i, j) in table.best else latex(cell) for j, cell in enumerate(row)]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])
