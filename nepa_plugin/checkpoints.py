"""Backbone weights in and out: timm folders, published NEPA folders, hub ids, Lightning ``.ckpt``, mmengine ``.pth``.

Loading is all or nothing, and nothing is unpickled: safetensors, or ``torch.load(weights_only=True)``.
"""

import json
import pickle
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from nepa_plugin.predictor import NepaViT

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
#: Key of a Lightning checkpoint under which methods store how to rebuild their backbone (a timm ``config.json``).
BACKBONE_CONFIG_KEY = "nepa_backbone_config"
#: Key of a Lightning checkpoint for the prefix of the exported backbone's weights, ``"backbone."`` where it is absent.
BACKBONE_PREFIX_KEY = "nepa_backbone_prefix"

# Published names on the right. {i} is the block; qkv, and fc1 of a gated MLP, are concatenations of several tensors.
_NEPA_KEYS: dict[str, tuple[str, ...]] = {
    "cls_token": ("embeddings.cls_token",),
    "patch_embed.proj.": ("embeddings.patch_embeddings.projection.",),
    "blocks.{i}.norm1.": ("encoder.layer.{i}.layernorm_before.",),
    "blocks.{i}.attn.qkv.": tuple(f"encoder.layer.{{i}}.attention.attention.{n}." for n in ("query", "key", "value")),
    "blocks.{i}.attn.q_norm.": ("encoder.layer.{i}.attention.attention.q_norm.",),
    "blocks.{i}.attn.k_norm.": ("encoder.layer.{i}.attention.attention.k_norm.",),
    "blocks.{i}.attn.proj.": ("encoder.layer.{i}.attention.output.dense.",),
    "blocks.{i}.gamma_1": ("encoder.layer.{i}.layer_scale.lambda1",),
    "blocks.{i}.norm2.": ("encoder.layer.{i}.layernorm_after.",),
    "blocks.{i}.mlp.fc1.": ("encoder.layer.{i}.intermediate.up_proj.",),
    "blocks.{i}.mlp.fc2.": ("encoder.layer.{i}.output.dense.",),
    "blocks.{i}.gamma_2": ("encoder.layer.{i}.output.layer_scale.lambda1",),
    "norm.": ("layernorm.",),
}
_GATED_FC1 = ("encoder.layer.{i}.intermediate.gate_proj.", "encoder.layer.{i}.intermediate.up_proj.")
_HEAD_KEYS = {"fc_norm.": "fc_norm.", "head.": "classifier."}


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit the model; the message says which keys and what to do."""


# -- loading -----------------------------------------------------------------------------------------------------------


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
    except RuntimeError as error:  # timm's word for a name it does not know
        raise CheckpointError(f"{source}: cannot build architecture {arch!r}: {error}") from error
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
    """Check that ``state`` covers every weight of ``model`` with the right shape, and nothing else.

    Args:
        model: The model.
        state: Weights under the model's own names.
        source: What to call the checkpoint in an error.

    Raises:
        CheckpointError: If a weight is missing, unexpected or of another shape; names them.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    shapes = [
        f"{k} is {tuple(state[k].shape)}, the model has {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    problems = [
        f"{what}: {_listing(keys)}"
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
    if config.get("model_type") == "vit_nepa":
        args = _args_from_nepa(config)
        state = _state_from_nepa(state, depth=args["depth"], gated=args["swiglu_mlp"])
        return "nepa_vit_base_patch14_224", args, state
    args = dict(config.get("model_args") or {})
    for key in ("num_classes", "global_pool"):
        if key in config:
            args.setdefault(key, config[key])
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
    if not isinstance(config, dict) or ("architecture" not in config and config.get("model_type") != "vit_nepa"):
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
    # mmengine's backbone is a wrapper that holds the timm model as "vit"
    if any(k.startswith("backbone.vit.") for k in checkpoint["state_dict"]):
        prefix = "backbone.vit."
    state = {k[len(prefix) :]: v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    return config, state


# -- saving ------------------------------------------------------------------------------------------------------------


def save_backbone(
    model: nn.Module, folder: str | Path, layout: Literal["timm", "nepa"] = "timm", overwrite: bool = False
) -> Path:
    """Write a model to a folder that :func:`load_backbone` reads.

    Args:
        model: A timm model; for ``layout="nepa"`` a ``NepaViT``.
        folder: Where to write ``config.json`` and ``model.safetensors``.
        layout: ``"timm"``, which ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads, or ``"nepa"``, the
            published layout.
        overwrite: Replace these two files if they exist.

    Returns:
        The folder.

    Raises:
        FileExistsError: If one of the files exists and ``overwrite`` is off.
        CheckpointError: If the layout cannot hold the model.
    """
    if layout == "timm":
        _check_built_by_name(model)
    folder = Path(folder)
    present = [f for f in (CONFIG_NAME, WEIGHTS_NAME) if (folder / f).exists()]
    if present and not overwrite:
        raise FileExistsError(f"{folder / present[0]} exists; choose another folder.")
    if layout not in ("timm", "nepa"):
        raise ValueError(f"layout={layout!r} is neither 'timm' nor 'nepa'.")
    folder.mkdir(parents=True, exist_ok=True)
    # Written beside the target first, so that an interruption leaves no half folder behind.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as tmp:
        if layout == "timm":
            save_for_hf(model, tmp, safe_serialization=True)
        else:
            config, state = _to_nepa(model)
            (Path(tmp) / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            save_file(state, Path(tmp) / WEIGHTS_NAME, metadata={"format": "pt"})
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            shutil.move(str(Path(tmp) / name), str(folder / name))
    return folder


def backbone_config(model: nn.Module) -> dict[str, Any]:
    """Return the timm ``config.json`` of a model, for storing inside a training checkpoint."""
    from timm.models._hub import save_config_for_hf

    _check_built_by_name(model)
    with tempfile.TemporaryDirectory() as tmp:
        save_config_for_hf(model, str(Path(tmp) / CONFIG_NAME))
        config: dict[str, Any] = json.loads((Path(tmp) / CONFIG_NAME).read_text())
    return config


def _check_built_by_name(model: nn.Module) -> None:
    if not hasattr(model, "pretrained_cfg"):  # where timm records the name
        raise CheckpointError(
            f"This {type(model).__name__} was not built by name, so a timm config cannot say how to rebuild it: build "
            "it with timm.create_model."
        )


# -- the published layout ----------------------------------------------------------------------------------------------


def _args_from_nepa(config: Mapping[str, Any]) -> dict[str, Any]:
    required = (
        "image_size",
        "patch_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    )
    if absent := [key for key in required if key not in config]:
        raise CheckpointError(f"The published NEPA config misses {_listing(absent)}.")
    classifier = "ViTNepaForImageClassification" in (config.get("architectures") or [])
    num_labels = len(config.get("id2label") or {}) or 2  # transformers leaves two labels out of the config
    unsupported = {
        key: config[key]
        for key, value in {"qkv_bias": True, "qk_norm": True, "qk_norm_bias": False, "layer_norm_eps": 1e-12}.items()
        if config.get(key, value) != value
    }
    if config.get("hidden_act", "gelu") not in ("gelu", "silu"):
        unsupported["hidden_act"] = config["hidden_act"]
    if unsupported:
        raise CheckpointError(f"This published NEPA config has options that no released checkpoint uses: {unsupported}")
    return {
        "img_size": config["image_size"],
        "patch_size": config["patch_size"],
        "in_chans": config.get("num_channels", 3),
        "embed_dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
        "swiglu_mlp": config.get("use_gated_mlp", False),
        "attention": "causal" if config.get("is_causal", True) else "bidirectional",
        "qk_norm_affine": config.get("qk_norm_affine", False),
        "init_values": config.get("layerscale_value", 1e-5),
        "rope_temperature": config.get("rope_theta", 100.0),
        # timm drops arguments that are None, so "off" is spelled as the factor 1
        "rope_rescale_coords": config.get("pos_embed_rescale") or 1.0,
        "rope_shift_coords": config.get("pos_embed_shift"),
        "rope_jitter_coords": config.get("pos_embed_jitter"),
        "num_classes": num_labels if classifier else 0,
    }


def _key_pairs(depth: int, gated: bool) -> list[tuple[str, tuple[str, ...]]]:
    """Return (own prefix, published prefixes) for every module of a model."""
    pairs = []
    for own, published in _NEPA_KEYS.items():
        if gated and ".fc1." in own:
            published = _GATED_FC1
        for i in range(depth) if "{i}" in own else [0]:
            pairs.append((own.format(i=i), tuple("vit_nepa." + p.format(i=i) for p in published)))
    return pairs + [(own, (published,)) for own, published in _HEAD_KEYS.items()]


def _suffixes(prefix: str) -> tuple[str, ...]:
    return ("weight", "bias") if prefix.endswith(".") else ("",)


def _state_from_nepa(published: Mapping[str, Tensor], depth: int, gated: bool) -> dict[str, Tensor]:
    state, used = {}, set()
    for own, prefixes in _key_pairs(depth, gated):
        for suffix in _suffixes(own):
            keys = [p + suffix for p in prefixes]
            found = [k for k in keys if k in published]
            if found and len(found) < len(keys):
                raise CheckpointError(f"The published checkpoint misses {_listing(sorted(set(keys) - set(found)))}.")
            if found:
                state[own + suffix] = torch.cat([published[k] for k in keys]) if len(keys) > 1 else published[keys[0]]
                used.update(keys)
    # Left over keys travel along under their own names, so that load_weights reports them as unexpected.
    return state | {k: v for k, v in published.items() if k not in used}


def _to_nepa(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not isinstance(model, NepaViT):
        raise CheckpointError(f"The published layout holds NEPA predictors, not {type(model).__name__}.")
    block, patch = model.blocks[0], model.patch_embed
    img_size, patch_size = patch.img_size, patch.patch_size
    if img_size[0] != img_size[1] or patch_size[0] != patch_size[1]:
        raise CheckpointError(f"The published layout holds square sizes, not {img_size} with patches {patch_size}.")
    gated = block.mlp.fc1.out_features != block.mlp.fc2.in_features
    own = model.state_dict()
    state: dict[str, Tensor] = {}
    for prefix, published in _key_pairs(len(model.blocks), gated):
        for suffix in _suffixes(prefix):
            if prefix + suffix in own:
                parts = own.pop(prefix + suffix).chunk(len(published))
                for key, part in zip(published, parts, strict=True):
                    state[key + suffix] = part.clone().contiguous()
    if own:
        raise CheckpointError(f"The published layout has no place for {_listing(list(own))}.")
    affine = isinstance(block.attn.q_norm.weight, nn.Parameter)
    config: dict[str, Any] = {
        "add_pooling_layer": True,
        "architectures": ["ViTNepaForImageClassification" if model.num_classes else "ViTNepaForPreTraining"],
        "attention_probs_dropout_prob": 0.0,
        "drop_path_prob": 0.0,
        "dtype": str(model.cls_token.dtype).removeprefix("torch."),
        "hidden_act": "silu" if gated else "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": model.embed_dim,
        "image_size": img_size[0],
        "initializer_range": 0.02,
        "intermediate_size": block.mlp.fc2.in_features,
        "is_causal": model.is_causal,
        "layer_norm_eps": model.norm.eps,
        "layerscale_value": block.init_values,
        "model_type": "vit_nepa",
        "num_attention_heads": block.attn.num_heads,
        "num_channels": model.in_chans,
        "num_hidden_layers": len(model.blocks),
        "patch_size": patch_size[0],
        "pos_embed_jitter": model.rope.jitter_coords,
        "pos_embed_rescale": model.rope.rescale_coords,
        "pos_embed_shift": model.rope.shift_coords,
        "qk_norm": True,
        "qk_norm_affine": affine,
        "qk_norm_bias": False,
        "qkv_bias": True,
        "rope_theta": model.rope.temperature,
        "transformers_version": "4.56.2",
        "use_gated_mlp": gated,
    }
    if model.num_classes:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(model.num_classes)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(model.num_classes)}
    return config, state


def _listing(keys: list[str], most: int = 6) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
