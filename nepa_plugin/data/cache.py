"""Where derived data is kept."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the folder for derived data: ``$NEPA_PLUGIN_CACHE``, by default ``~/.cache/nepa_plugin``."""
    return Path(os.environ.get("NEPA_PLUGIN_CACHE") or Path.home() / ".cache" / "nepa_plugin")


def private_folder(path: Path) -> Path:
    """Make a folder, and those above it that are missing, for this user alone; those that are there stay as they are.

    Raises:
        OSError: If it cannot be made.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
    return path
