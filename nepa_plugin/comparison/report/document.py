"""The files of a comparison's report."""

import base64
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path

from nepa_plugin.comparison.plan import Run
from nepa_plugin.comparison.report.ablations import ablation_table, plot_ablations
from nepa_plugin.comparison.report.attention import attention_table
from nepa_plugin.comparison.report.costs import cost_tables
from nepa_plugin.comparison.report.exports import latex_table, write_csv
from nepa_plugin.comparison.report.facts import caveats, failures, inequalities
from nepa_plugin.comparison.report.figures import (
    plot_compute,
    plot_losses,
    plot_online_probe,
    plot_readout,
    plot_scores,
)
from nepa_plugin.comparison.report.methods import bibliography
from nepa_plugin.comparison.report.published import published_table
from nepa_plugin.comparison.report.tables import Table, accuracy_table
from nepa_plugin.comparison.report.verdict import verdict


def write_report(
    runs: Sequence[Run], out: Path, command: str, title: str = "Comparison", others: Sequence[Table] = ()
) -> None:
    """Write ``report.html`` (one self-contained file), ``report.md`` with ``figures/*.png``, and the numbers.

    These are ``results.csv`` (a row per run and protocol), ``tables.tex``, and ``methods.bib``.

    Args:
        runs: What :func:`nepa_plugin.comparison.compare` returned.
        out: Folder to write to; files of an earlier report are replaced.
        command: The command that made it, for the reader to repeat.
        title: Of the report.
        others: Further tables, which come after the costs.
    """
    answer = verdict(runs)
    first = {"scores": ("Who is ahead", plot_scores(runs))} if answer else {}
    answer = [*answer, *caveats(runs)]
    figures = {
        "compute": ("Accuracy against cost", plot_compute(runs)),
        "readout": ("Where the information is: linear probe by depth", plot_readout(runs)),
        "probe": ("Online probe in training: do features improve? Not: which are better", plot_online_probe(runs)),
        "loss": ("Training loss", plot_losses(runs)),
    }
    last = {}
    if (ablations := plot_ablations(runs)) is not None:
        last["ablations"] = ("NEPA's rows in training: curves", ablations)
    pictures: dict[str, bytes] = {}
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for name, (_, figure) in (first | figures | last).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
        pictures[name] = buffer.getvalue()
        (out / "figures" / f"{name}.png").write_bytes(pictures[name])
    accuracy = accuracy_table(runs)
    parts: list[Table | tuple[str, str]] = [accuracy] if accuracy.rows else []
    parts += [(name, caption) for name, (caption, _) in figures.items()]
    parts[2:2] = [*cost_tables(runs), *others]
    parts += [table for table in (attention_table(runs), ablation_table(runs)) if table.rows]
    parts += [(name, caption) for name, (caption, _) in last.items()]
    if (published := published_table(runs)).rows:
        parts.append(published)
    equal, different = inequalities(runs)
    lists = {
        "Not equal between rows": different,
        "Equal in all rows": equal,
        "Failed": failures(runs),
    }
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
    markdown = [f"# {_plain(title)}", ""]
    page = [f"<h1>{html.escape(title)}</h1>"]
    if answer:
        markdown += [" ".join(map(_plain, answer)), ""]
        page.append(f'<p class="answer">{html.escape(" ".join(answer))}</p>')
    for name, (caption, _) in first.items():
        markdown += [f"![{caption}](figures/{name}.png)", ""]
        page.append(_picture(caption, pictures[name]))
    for part in parts:
        if isinstance(part, Table):
            markdown += _markdown(part)
            page.append(_html(part))
        else:
            name, caption = part
            markdown += [f"## {caption}", "", f"![{caption}](figures/{name}.png)", ""]
            page.append(f"<h2>{caption}</h2>{_picture(caption, pictures[name])}")
    for heading, lines in lists.items():
        if lines:
            markdown += [f"## {heading}", "", *(f"- {_plain(line)}" for line in lines), ""]
            page.append(f"<h2>{heading}</h2><ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>")
    markdown += ["## Made by", "", fence, command, fence, ""]
    page.append(f"<h2>Made by</h2><pre>{html.escape(command)}</pre>")
    (out / "report.md").write_text("\n".join(markdown))
    (out / "report.html").write_text(_PAGE.format(title=html.escape(title), body="\n".join(page)))
    write_csv(runs, out / "results.csv")
    tables = [accuracy, *cost_tables(runs)]
    (out / "tables.tex").write_text("\n".join(latex_table(table) for table in tables if table.rows))
    (out / "methods.bib").write_text(bibliography(runs))


def _plain(text: str) -> str:
    """Return text of others, such as names and errors, as Markdown that shows it as it is, on one line."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*\[\]|#~])", r"\\\1", text)


def _markdown(table: Table) -> list[str]:
    def cells(row: list[str]) -> str:
        return f"| {' | '.join(map(_plain, row))} |"

    lines = [f"## {table.heading}", "", cells(table.header), f"|{' --- |' * len(table.header)}"]
    rows = []
    for i, row in enumerate(table.rows):
        marked = [f"**{_plain(cell)}**" if (i, j) in table.best else _plain(cell) for j, cell in enumerate(row)]
        rows.append(f"| {' | '.join(marked)} |")
    return [*lines, *rows, "", table.note, ""]


def _html(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    body = ""
    for i, row in enumerate(table.rows):
        best = [' class="best"' if (i, j) in table.best else "" for j in range(len(row))]
        body += f"<tr>{''.join(f'<td{b}>{html.escape(cell)}</td>' for b, cell in zip(best, row, strict=True))}</tr>"
    title, note = html.escape(table.heading), html.escape(table.note)
    return f"<h2>{title}</h2><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{note}</p>"


def _picture(caption: str, data: bytes) -> str:
    return f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }}
th, td {{ border-bottom: 1px solid #ddd; padding: 0.3rem 0.6rem; text-align: right; }}
td.best {{ font-weight: bold; }}
p.answer {{ font-size: 1.25rem; }}
th:first-child, td:first-child {{ text-align: left; }}
pre {{ background: #f4f4f4; padding: 0.7rem; white-space: pre-wrap; }}
img {{ max-width: 100%; }}
@media print {{
  body {{ font-size: 11px; margin: 0; max-width: none; }}
  table {{ font-size: 9px; }} th, td {{ padding: 0.15rem 0.3rem; }}
  h2 {{ break-after: avoid; }} table, img {{ break-inside: avoid; }} img {{ max-height: 60vh; }}
}}
</style></head><body>
{body}
</body></html>
"""
