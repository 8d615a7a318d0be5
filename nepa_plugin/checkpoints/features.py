"""Where a backbone's features read best: what the readout found, in a file beside the weights."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nepa_plugin.checkpoints.errors import CheckpointError
from nepa_plugin.runtime.files import write_json
from nepa_plugin.runtime.reading import read_json

READOUT_NAME = "readout.json"


def weights_hash(model: nn.Module) -> str:
    """Return a SHA-256 of a model's weights: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_best_feature(folder: str | Path, model: nn.Module, depth: str, pool: str, **about: Any) -> Path:
    """Write down beside a backbone where its features read best.

    Args:
        folder: The backbone's.
        model: The backbone.
        depth: Of the best feature.
        pool: Of the best feature.
        **about: What it was found on, and what it scored.

    Returns:
        The file.
    """
    path = Path(folder) / READOUT_NAME
    write_json(path, {"depth": depth, "pool": pool, "weights_sha256": weights_hash(model), **about})
    return path


def read_best_feature(source: str | Path, model: nn.Module) -> tuple[str, str]:
    """Return depth and pooling of the best feature that the readout has found for a backbone.

    Raises:
        CheckpointError: If no readout has been run on it, or on other weights than these.
    """
    path = Path(source) / READOUT_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{source} does not say which feature is best: there is no {READOUT_NAME}. Find out with nepa evaluate "
            f"{source} --data FOLDER --protocol readout."
        )
    found = read_json(path, {"depth": str, "pool": str, "weights_sha256": str}, "Run the readout again.")
    if found["weights_sha256"] != weights_hash(model):
        raise CheckpointError(f"{path} is of other weights than {source} holds now. Run the readout again.")
    return found["depth"], found["pool"]
