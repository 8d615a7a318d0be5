"""Backbone weights in: timm folders, published NEPA folders, hub ids, Lightning ``.ckpt``, mmengine ``.pth``.

Loading is all or nothing, and nothing is unpickled: safetensors, or ``torch.load(weights_only=True)``.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nepa_plugin import models as models  # the names that checkpoints are built by
from nepa_plugin.checkpoints.errors import CheckpointError, listing
from nepa_plugin.checkpoints.plausible import check_plausible
from nepa_plugin.checkpoints.published import MODEL_TYPE, args_from_nepa, state_from_nepa
from nepa_plugin.checkpoints.tensors import read_tensors
from nepa_plugin.checkpoints.writing import CONFIG_NAME, WEIGHTS_NAME, backbone_config

#: Key of a Lightning checkpoint under which methods store how to rebuild their backbone (a timm ``config.json``).
BACKBONE_CONFIG_KEY = "nepa_backbone_config"
#: Key of a Lightning checkpoint for the prefix of the exported backbone's weights, ``"backbone."`` where it is absent.
BACKBONE_PREFIX_KEY = "nepa_backbone_prefix"


def load_backbone(source: str | Path, **model_args: Any) -> nn.Module:
    """Build the model that a checkpoint holds and load its weights, all of them or none.

    Args:
        source: One of: a timm folder (``config.json`` and ``model.safetensors``, what pretraining exports); a
            published NEPA folder (``"model_type": "vit_nepa"``), pretraining or classifier layout; the
            ``model.safetensors`` inside such a folder; a Hugging Face hub id (``"owner/name"``); a Lightning ``.ckpt``
            of a pretraining run (its EMA weights); an mmengine ``.pth`` written with ``CheckpointGuardHook``.
        **model_args: Override how the model is built, e.g. ``img_size=448``, ``attention="bidirectional"``,
            ``drop_path_rate=0.1``. Architecture changes that the weights do not fit are an error.

    Returns:
        The model in evaluation mode: a ``NepaViT``, or any timm model that the folder names.

    Raises:
        FileNotFoundError: If the source does not exist.
        CheckpointError: If it is damaged, of unknown format, or does not cover every weight; names the keys.
    """
    arch, args, state = read_checkpoint(source)
    try:
        model = timm.create_model(arch, pretrained=False, **(args | model_args))
    except Exception as error:  # what a constructor says of arguments that do not go together
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{source}: cannot build {arch!r} with {args | model_args}: {reason}") from error
    load_weights(model, state, str(source))
    return model.eval()


def untrained_like(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return the same architecture with fresh weights, as a floor to compare with.

    Args:
        model: A timm model that was built by name.
        seed: Seed of the initialisation; the global generator is left as it was.

    Returns:
        The untrained model in evaluation mode.
    """
    config = backbone_config(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(config["architecture"], **config.get("model_args", {})).eval()


def check_fit(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Check that ``state`` covers every weight of ``model`` with the right shape, and nothing else, in finite numbers.

    Args:
        model: The model.
        state: Weights under the model's own names.
        source: What to call the checkpoint in an error.

    Raises:
        CheckpointError: If a weight is missing, unexpected, of another shape, or not finite; names them.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    shapes = [
        f"{k} is {tuple(state[k].shape)}, the model has {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if infinite := [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]:
        raise CheckpointError(
            f"{source} holds values that are not finite in {listing(infinite)}: its training has diverged. Take an "
            "earlier checkpoint; nothing was loaded."
        )
    problems = [
        f"{what}: {listing(keys)}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("shape differs", shapes))
        if keys
    ]
    if problems:
        raise CheckpointError(
            f"{source} does not fit {type(model).__name__}; nothing was loaded. "
            + "; ".join(problems)
            + ". Build the model with the checkpoint's size, or take the checkpoint of this model."
        )


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load ``state`` into ``model``, all of it or nothing. Arguments and errors as for :func:`check_fit`."""
    check_fit(model, state, source)
    model.load_state_dict(state)


def read_checkpoint(source: str | Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Return how to build a checkpoint's model, and its weights under that model's names.

    Args:
        source: As for :func:`load_backbone`.

    Returns:
        ``(timm name, arguments of timm.create_model, state_dict)``; the tensors are on the CPU.

    Raises:
        FileNotFoundError: If the source does not exist.
        CheckpointError: If it cannot be read.
    """
    config, state = _read_stored(source)
    if config.get("model_type") == MODEL_TYPE:
        try:
            args = args_from_nepa(config)
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error}") from None
        # Its blocks are counted under their own names only once their number is known.
        check_plausible("nepa_vit_base_patch14_224", args, state, str(source))
        state = state_from_nepa(state, depth=args["depth"], gated=args["swiglu_mlp"])
        return "nepa_vit_base_patch14_224", args, state
    args = config.get("model_args") or {}
    if not isinstance(args, dict):
        raise CheckpointError(f"{source}: `model_args` of its config must be a mapping, not {args!r}.")
    args = dict(args)
    for key in ("num_classes", "global_pool"):
        if key in config:
            args.setdefault(key, config[key])
    check_plausible(config["architecture"], args, state, str(source))
    return config["architecture"], args, state


def _read_stored(source: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and weights as they are in the file: timm's or the published layout."""
    path = Path(source)
    if path.is_file() and path.suffix in (".ckpt", ".pth", ".pt"):
        return _read_torch(path)
    if path.is_file() and path.suffix == ".safetensors":
        weights = path
    elif path.is_dir():
        weights = path / WEIGHTS_NAME
    elif not path.exists() and re.fullmatch(r"(hf-hub:)?[\w.-]+/[\w.-]+(@[\w.-]+)?", str(source)):
        weights = _download(str(source).removeprefix("hf-hub:"))
    else:
        raise FileNotFoundError(
            f"No checkpoint at {source}: give a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, a .ckpt of a pretraining "
            "run, or a hub id such as owner/name."
        )
    config_path = weights.parent / CONFIG_NAME
    for file in (config_path, weights):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: a backbone folder holds {CONFIG_NAME} and {WEIGHTS_NAME}.")
    try:
        config = json.loads(config_path.read_text())
        state = load_file(weights)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise CheckpointError(f"{weights.parent} is damaged: {error}. Copy or export it again.") from error
    if not isinstance(config, dict) or ("architecture" not in config and config.get("model_type") != MODEL_TYPE):
        raise CheckpointError(
            f'{config_path} is neither a timm config ("architecture") nor a published NEPA config '
            '("model_type": "vit_nepa").'
        )
    return config, state


def _download(hub_id: str) -> Path:
    from huggingface_hub import hf_hub_download

    repo, _, revision = hub_id.partition("@")
    try:
        hf_hub_download(repo, CONFIG_NAME, revision=revision or None)
        return Path(hf_hub_download(repo, WEIGHTS_NAME, revision=revision or None))
    except Exception as error:  # the hub client has many: no network, no such repository, no access
        raise FileNotFoundError(
            f"No local folder {hub_id}, and it could not be fetched from the Hugging Face hub: {error}"
        ) from error


def _read_torch(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
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
    if (
        not isinstance(prefix, str)
        or not isinstance(weights, Mapping)
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items())
    ):
        raise CheckpointError(f"{path}: its 'state_dict' is no mapping of names to tensors.")
    # mmengine's backbone is a wrapper that holds the timm model as "vit"
    if any(k.startswith("backbone.vit.") for k in weights):
        prefix = "backbone.vit."
    state = {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
    return config, state
