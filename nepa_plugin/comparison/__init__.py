"""Several methods on equal terms: trained, evaluated the same way, and reported."""

from nepa_plugin.comparison.run import Comparison, ComparisonError, Run, compare

__all__ = ["Comparison", "ComparisonError", "Run", "compare"]
