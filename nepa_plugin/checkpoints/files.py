"""The files of a checkpoint: which of them hold its config and weights, and what stands in them, tensors only."""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nepa_plugin.checkpoints.errors import CheckpointError, listing
from nepa_plugin.checkpoints.published import MODEL_TYPE
from nepa_plugin.checkpoints.tensors import read_tensors
from nepa_plugin.checkpoints.writing import BACKBONE_CONFIG_KEY, BACKBONE_PREFIX_KEY, CONFIG_NAME, WEIGHTS_NAME

#: Of a run folder of the published code.
Weights = Literal["average", "raw"]
#: Where the published code keeps the moving average of the weights, beside the raw ones in ``model.safetensors``.
AVERAGE_NAME = "pytorch_model_ema.bin"
#: Which shard holds which tensor, where the weights are in several files.
INDEX_NAME = "model.safetensors.index.json"


def read_stored(source: str | Path, weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Return config and weights as they are in the files, timm's or the published layout.

    A training checkpoint's weights come without the prefix that they have in it, which is returned, too.

    Args:
        source: As for :func:`nepa_plugin.load_backbone`.
        weights: As for :func:`nepa_plugin.load_backbone`.

    Raises:
        FileNotFoundError: If the source does not exist.
        CheckpointError: If it cannot be read.
    """
    path = Path(source)
    if path.is_file() and path.suffix in (".ckpt", ".pth", ".pt"):
        return _read_torch(path)
    if path.is_file() and path.suffix in (".safetensors", ".bin"):
        file = path
    elif path.is_dir():
        file = _weights_file(path, weights)
    elif not path.exists() and re.fullmatch(r"(hf-hub:)?[\w.-]+/[\w.-]+(@[\w.-]+)?", str(source)):
        file = _download(str(source).removeprefix("hf-hub:"))
    else:
        raise FileNotFoundError(
            f"No checkpoint at {source}: give a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, a .ckpt of a pretraining "
            "run, or a hub id such as owner/name."
        )
    config_path = file.parent / CONFIG_NAME
    for needed in (config_path, file):
        if not needed.is_file():
            raise FileNotFoundError(f"{needed} is missing: a backbone folder holds {CONFIG_NAME} and {WEIGHTS_NAME}.")
    try:
        config = json.loads(config_path.read_text())
        if file.name == INDEX_NAME:
            state = _read_shards(file)
        else:
            state = _read_state(file) if file.suffix == ".bin" else load_file(file)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise CheckpointError(f"{file.parent} is damaged: {error}. Copy or export it again.") from error
    if not isinstance(config, dict) or ("architecture" not in config and config.get("model_type") != MODEL_TYPE):
        raise CheckpointError(
            f'{config_path} is neither a timm config ("architecture") nor a published NEPA config '
            '("model_type": "vit_nepa").'
        )
    return config, state, ""


def _weights_file(folder: Path, weights: Weights) -> Path:
    """Return the file of a folder that holds the weights, or says which files do."""
    average, whole, index = (folder / name for name in (AVERAGE_NAME, WEIGHTS_NAME, INDEX_NAME))
    raw = index if index.is_file() and not whole.is_file() else whole
    if weights == "raw" or not average.is_file():
        return raw
    if raw.is_file():
        warnings.warn(
            f"{folder} holds raw weights and their moving average: {AVERAGE_NAME}, the average, is taken, as NEPA "
            "transfers it. weights='raw' takes the others.",
            stacklevel=4,
        )
    return average


def _read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickled state dict, which may stand under ``state_dict``."""
    content = read_tensors(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not _is_state(content):
        raise CheckpointError(f"{path} is no mapping of names to tensors.")
    return dict(content)


def _is_state(content: Mapping[Any, Any]) -> bool:
    return all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Return the tensors of all shards that an index names; they lie beside it."""
    content = json.loads(index.read_text())
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} is damaged: its weight_map does not say which file holds which tensor.")
    state: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, which is not beside it.")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index.parent / name} is missing, which {index.name} names. Copy it, too.")
        state |= load_file(index.parent / name)
    if absent := sorted(set(places) - set(state)):
        raise CheckpointError(f"{index.parent} is damaged: its shards miss {listing(absent)}. Copy it again.")
    return state


def _download(hub_id: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    repo, _, revision = hub_id.partition("@")

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(repo, name, revision=revision or None))

    try:
        fetch(CONFIG_NAME)
        try:
            return fetch(WEIGHTS_NAME)
        except EntryNotFoundError:  # in shards, then
            index = fetch(INDEX_NAME)
            for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
                fetch(name)
            return index
    except Exception as error:  # the hub client has many: no network, no such repository, no access
        raise FileNotFoundError(
            f"No local folder {hub_id}, and it could not be fetched from the Hugging Face hub: {error}"
        ) from error


def _read_torch(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    checkpoint = read_tensors(path)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} holds no 'state_dict': it is not a training checkpoint.")
    config = checkpoint.get(BACKBONE_CONFIG_KEY)
    if not isinstance(config, dict) or "architecture" not in config:
        raise CheckpointError(
            f"{path} does not say how to build its backbone (no {BACKBONE_CONFIG_KEY!r}): it was written neither by "
            "this package's methods nor, under mmengine, with custom_hooks=[dict(type='CheckpointGuardHook')]."
        )
    prefix = checkpoint.get(BACKBONE_PREFIX_KEY, "backbone.")
    weights = checkpoint["state_dict"]
    if not isinstance(prefix, str) or not isinstance(weights, Mapping) or not _is_state(weights):
        raise CheckpointError(f"{path}: its 'state_dict' is no mapping of names to tensors.")
    # mmengine's backbone is a wrapper that holds the timm model as "vit"
    if any(k.startswith("backbone.vit.") for k in weights):
        prefix = "backbone.vit."
    state = {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
    return config, state, prefix
