"""Files of ``torch.save``: written at once or not at all, and read as tensors only, with nothing unpickled."""

import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nepa_plugin.checkpoints.errors import CheckpointError

#: Names of files that are being written begin with this; after a kill, such a file is of no use.
PART_PREFIX = ".saving-"


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)`` read mmengine's checkpoints, where mmengine is installed.

    Their training log is made of mmengine's ``HistoryBuffer`` and numpy arrays: exactly those are allowed.
    """
    try:
        from mmengine.logging import HistoryBuffer
    except ImportError:
        return

    def statistic(owner: type, name: str) -> Any:
        if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
            raise pickle.UnpicklingError(f"getattr({owner!r}, {name!r}) is not part of an mmengine checkpoint.")
        return getattr(HistoryBuffer, name)

    multiarray = (np._core if hasattr(np, "_core") else np.core).multiarray  # numpy 2 renamed it
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            # A buffer's state holds its four methods, which pickle looks up with getattr: those and no others.
            (statistic, "builtins.getattr"),
            multiarray._reconstruct,
            multiarray.scalar,
            np.ndarray,
            np.dtype,
            *(type(np.dtype(name)) for name in ("bool", "int32", "int64", "float32", "float64")),
        ]
    )


def read_tensors(path: str | Path) -> Any:
    """Return what ``torch.load(weights_only=True)`` reads from a file, on the CPU.

    Args:
        path: A ``.ckpt``, ``.pth`` or ``.pt`` file.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: If it is damaged, or holds objects other than tensors and mmengine's log.
    """
    if Path(path).suffix == ".pth":
        allow_mmengine_checkpoints()
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on garbage, the restricted unpickler fails in any way, sometimes without a message
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} cannot be read as tensors only: {reason}") from error


def write_tensors(content: Any, path: str | Path, previous: str | Path | None = None) -> None:
    """Write what ``torch.save`` takes to a file, so that at every moment the old file or the new one is there, whole.

    It is written beside its place, forced to the disk, and renamed. Through a temporary folder on another file system
    the last step would be a copy, which a kill or a full disk leaves half done.

    Args:
        content: What to save.
        path: The file.
        previous: Where the file that ``path`` was until now goes; it is dropped by default.

    Raises:
        CheckpointError: If it cannot be written. The old file stays.
    """
    path = Path(path)
    part = path.with_name(f"{PART_PREFIX}{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.is_file():
            link = path.with_name(f"{PART_PREFIX}{Path(previous).name}.{os.getpid()}")
            link.unlink(missing_ok=True)
            os.link(path, link)  # the old file has both names until the new one takes the first
            os.replace(link, previous)
        os.replace(part, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer has its own for a full disk
        with suppress(OSError):
            part.unlink(missing_ok=True)
        kept = " The one before it is kept." if path.is_file() else ""
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise CheckpointError(f"{path} could not be written: {reason}.{kept} Make room, or write elsewhere.") from error


def _sync_folder(folder: Path) -> None:
    """Force a rename to the disk, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
