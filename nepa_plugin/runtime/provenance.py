"""What it takes to repeat a result: versions, commit and hardware."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("nepa-plugin", "torch", "torchvision", "lightly", "timm", "pytorch-lightning", "scikit-learn", "numpy")


def provenance() -> dict[str, Any]:
    """Return versions, the package's git commit (``None`` outside a checkout), and the hardware.

    Returns:
        A mapping that JSON can hold: ``versions``, ``python``, ``commit``, ``uncommitted_changes``, ``hardware``.
    """
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "commit": commit,
        "uncommitted_changes": bool(changes) if commit else None,
        "hardware": {"gpus": gpus, "cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*args: str) -> str | None:
    """Return what git says about the checkout this package lies in, or nothing if it lies in none of its own."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()
