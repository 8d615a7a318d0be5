"""Files of ``torch.save``: written at once or not at all, and read as tensors only, with nothing unpickled."""

import errno
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nepa_plugin.checkpoints.errors import CheckpointError
from nepa_plugin.runtime.files import whole_file


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


def read_tensors(path: str | Path, mmap: bool = False) -> Any:
    """Return what ``torch.load(weights_only=True)`` reads from a file, on the CPU.

    Args:
        path: A ``.ckpt``, ``.pth`` or ``.pt`` file.
        mmap: Read the tensors only when they are used.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: If it is damaged, or holds objects other than tensors and mmengine's log.
    """
    if Path(path).suffix == ".pth":
        allow_mmengine_checkpoints()
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except Exception as error:  # on garbage, the restricted unpickler fails in any way, sometimes without a message
        raise CheckpointError(f"{path} cannot be read as tensors only: {_reason(path, error)}") from error


def _reason(path: str | Path, error: Exception) -> str:
    """Return why a file cannot be read, without torch's advice to unpickle it."""
    text = str(error)
    if refused := re.search(r"(?:GLOBAL|global:|class) ([\w.]+\.[\w.]+)", text.replace("global: GLOBAL", "GLOBAL")):
        return f"it holds a {refused.group(1)}, and unpickling that could run any code. Save its tensors alone."
    if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is what a cut file gives
        return f"{error.strerror or text}."
    if Path(path).is_file() and not Path(path).stat().st_size:
        return "it is empty."
    return "it is cut off, damaged, or no file of torch.save. Take another copy, or an earlier checkpoint."


def write_tensors(content: Any, path: str | Path, previous: str | Path | None = None) -> None:
    """Write what ``torch.save`` takes to a file, so that at every moment the old file or the new one is there, whole.

    See :func:`~nepa_plugin.runtime.files.whole_file` for how.

    Args:
        content: What to save.
        path: The file.
        previous: Where the file that ``path`` was until now goes; it is dropped by default.

    Raises:
        CheckpointError: If it cannot be written. The old file stays.
    """
    path = Path(path)
    try:
        with whole_file(path, previous) as part, part.open("wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch's writer has its own for a full disk
        kept = " The one before it is kept." if path.is_file() else ""
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise CheckpointError(f"{path} could not be written: {reason}.{kept} Make room, or write elsewhere.") from error
