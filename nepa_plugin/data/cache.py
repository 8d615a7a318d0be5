"""Where derived data is kept."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the folder for derived data: ``$NEPA_PLUGIN_CACHE``, by default ``~/.cache/nepa_plugin``."""
    return Path(os.environ.get("NEPA_PLUGIN_CACHE") or Path.home() / ".cache" / "nepa_plugin")
