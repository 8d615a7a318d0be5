"""The report of a comparison: the answer in a sentence, tables, plots, and what is not equal between its rows."""

from nepa_plugin.comparison.report.costs import cost_tables
from nepa_plugin.comparison.report.document import write_report
from nepa_plugin.comparison.report.exports import write_csv
from nepa_plugin.comparison.report.facts import failures, inequalities
from nepa_plugin.comparison.report.tables import accuracy_table
from nepa_plugin.comparison.report.verdict import verdict

__all__ = ["accuracy_table", "cost_tables", "failures", "inequalities", "verdict", "write_csv", "write_report"]
