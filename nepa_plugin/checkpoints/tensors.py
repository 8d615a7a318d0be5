"""Files of ``torch.save``, read as tensors only: nothing is unpickled."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nepa_plugin.checkpoints.errors import CheckpointError


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
