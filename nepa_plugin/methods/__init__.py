"""Self-supervised methods, one file each."""

from nepa_plugin.methods.base import Method
from nepa_plugin.methods.nepa import NEPA

__all__ = ["NEPA", "Method"]
