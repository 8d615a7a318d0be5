"""Several methods on equal terms: trained, evaluated the same way, and reported."""

from nepa_plugin.comparison.plan import Comparison, ComparisonError, Run
from nepa_plugin.comparison.run import compare

__all__ = ["Comparison", "ComparisonError", "Run", "compare"]
