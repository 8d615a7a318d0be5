"""The files of a comparison's report."""

import base64
import csv
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path

from nepa_plugin.comparison.plan import Run
from nepa_plugin.comparison.report.figures import plot_compute, plot_losses, plot_online_probe, plot_readout
from nepa_plugin.comparison.report.tables import (
    PROTOCOLS,
    Table,
    accuracy_table,
    best_readout,
    cost_table,
    failures,
    inequalities,
    score,
    training_pflop,
)


def write_csv(runs: Sequence[Run], path: Path) -> None:
    """Write a row per run: seed, scores, cost, error."""
    protocols = [*PROTOCOLS, "readout"]
    costs = ["epochs", "images_seen", "seconds", "images_per_second", "peak_memory_bytes", "views", "encoder_passes"]
    costs += ["encoder_tokens", "gflops", "backbone_parameters", "discarded_parameters"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", *protocols, "readout_where", *costs, "training_pflop", "error"])
        for run in runs:
            best = best_readout(run)
            writer.writerow(
                [
                    run.name,
                    run.seed,
                    *(score(run, p) for p in protocols),
                    best[1] if best else "",
                    *(run.summary.get(key, "") for key in costs),
                    training_pflop(run),
                    run.error or "",
                ]
            )


def write_report(runs: Sequence[Run], out: Path, command: str, title: str = "Comparison") -> None:
    """Write ``report.html`` (one self-contained file), ``report.md`` with ``figures/*.png``, and ``results.csv``.

    Args:
        runs: What :func:`nepa_plugin.comparison.compare` returned.
        out: Folder to write to; files of an earlier report are replaced.
        command: The command that made it, for the reader to repeat.
        title: Of the report.
    """
    figures = {
        "compute": ("Accuracy against training compute", plot_compute(runs)),
        "readout": ("Where the information is: linear probe by depth", plot_readout(runs)),
        "probe": ("Online probe during training", plot_online_probe(runs)),
        "loss": ("Training loss", plot_losses(runs)),
    }
    pictures: dict[str, bytes] = {}
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for name, (_, figure) in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        pictures[name] = buffer.getvalue()
        (out / "figures" / f"{name}.png").write_bytes(pictures[name])
    tables = [table for table in (accuracy_table(runs), cost_table(runs)) if table.rows]
    equal, different = inequalities(runs)
    lists = {
        "Not equal between rows": different,
        "Equal in all rows": equal,
        "Failed": failures(runs),
    }
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
    markdown = [f"# {_plain(title)}", "", fence, command, fence, ""]
    page = [f"<h1>{html.escape(title)}</h1><pre>{html.escape(command)}</pre>"]
    for table in tables:
        markdown += _markdown(table)
        page.append(_html(table))
    for name, (caption, _) in figures.items():
        markdown += [f"## {caption}", "", f"![{caption}](figures/{name}.png)", ""]
        data = base64.b64encode(pictures[name]).decode()
        page.append(f'<h2>{caption}</h2><img alt="{caption}" src="data:image/png;base64,{data}">')
    for heading, lines in lists.items():
        if lines:
            markdown += [f"## {heading}", "", *(f"- {_plain(line)}" for line in lines), ""]
            page.append(f"<h2>{heading}</h2><ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>")
    (out / "report.md").write_text("\n".join(markdown))
    (out / "report.html").write_text(_PAGE.format(title=html.escape(title), body="\n".join(page)))
    write_csv(runs, out / "results.csv")


def _plain(text: str) -> str:
    """Return text of others, such as names and errors, as Markdown that shows it as it is, on one line."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*\[\]|#~])", r"\\\1", text)


def _markdown(table: Table) -> list[str]:
    def cells(row: list[str]) -> str:
        return f"| {' | '.join(map(_plain, row))} |"

    lines = [f"## {table.heading}", "", cells(table.header), f"|{' --- |' * len(table.header)}"]
    return [*lines, *map(cells, table.rows), "", table.note, ""]


def _html(table: Table) -> str:
    def cells(row: list[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)}</tr>"

    body = "".join(cells(row, "td") for row in table.rows)
    return f"<h2>{table.heading}</h2><table>{cells(table.header, 'th')}{body}</table><p>{html.escape(table.note)}</p>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }}
th, td {{ border-bottom: 1px solid #ddd; padding: 0.3rem 0.6rem; text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
pre {{ background: #f4f4f4; padding: 0.7rem; white-space: pre-wrap; }}
img {{ max-width: 100%; }}
</style></head><body>
{body}
</body></html>
"""
