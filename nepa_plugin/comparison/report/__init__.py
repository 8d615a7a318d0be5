"""The report of a comparison: tables, plots, and what is not equal between its rows."""

from nepa_plugin.comparison.report.document import write_csv, write_report
from nepa_plugin.comparison.report.tables import accuracy_table, cost_table, failures, inequalities

__all__ = ["accuracy_table", "cost_table", "failures", "inequalities", "write_csv", "write_report"]
