"""Backbone weights in: timm folders, published NEPA folders, hub ids, Lightning ``.ckpt``, mmengine ``.pth``.

Loading is all or nothing, and nothing is unpickled: safetensors, or ``torch.load(weights_only=True)``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from nepa_plugin import models as models  # the names that checkpoints are built by
from nepa_plugin.checkpoints.class_names import name_classes
from nepa_plugin.checkpoints.errors import CheckpointError, listing
from nepa_plugin.checkpoints.features import read_best_feature
from nepa_plugin.checkpoints.files import Weights, read_stored
from nepa_plugin.checkpoints.plausible import check_plausible
from nepa_plugin.checkpoints.published import MODEL_TYPE, args_from_nepa, class_names_from_nepa, state_from_nepa
from nepa_plugin.checkpoints.writing import backbone_config
from nepa_plugin.predictor import NepaViT


def load_backbone(
    source: str | Path,
    weights: Weights = "average",
    feature: Literal["best"] | None = None,
    **model_args: Any,
) -> nn.Module:
    """Build the model that a checkpoint holds and load its weights, all of them or none.

    Args:
        source: One of: a timm folder (``config.json`` and ``model.safetensors``, what pretraining exports); a
            published NEPA folder (``"model_type": "vit_nepa"``), pretraining or classifier layout, whole or in shards,
            or a run folder of the published code; the weights file inside such a folder; a Hugging Face hub id
            (``"owner/name"``); a Lightning ``.ckpt`` of a pretraining run (its EMA weights); an mmengine ``.pth``
            written with ``CheckpointGuardHook``.
        weights: Where a run folder of the published code holds averaged weights (``pytorch_model_ema.bin``) beside the
            raw ones: ``"average"``, which is what NEPA transfers, or ``"raw"``.
        feature: ``"best"`` lets ``model.extract_features`` of a NEPA predictor read the depth and pooling that ``nepa
            evaluate --protocol readout`` has found for this folder.
        **model_args: Override how the model is built, e.g. ``img_size=448``, ``attention="bidirectional"``,
            ``drop_path_rate=0.1``. Architecture changes that the weights do not fit are an error.

    Returns:
        The model in evaluation mode: a ``NepaViT``, or any timm model that the folder names. A classifier's class names
        are in ``model.pretrained_cfg["label_names"]``, where the checkpoint has them.

    Raises:
        FileNotFoundError: If the source does not exist.
        CheckpointError: If it is damaged, of unknown format, or does not cover every weight; names the keys.
    """
    stored = open_checkpoint(source, weights)
    arch, args = stored.arch, stored.args | model_args
    try:
        model = timm.create_model(arch, pretrained=False, **args)
    except Exception as error:  # what a constructor says of arguments that do not go together
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{source}: cannot build {arch!r} with {args}: {reason}") from error
    load_weights(model, stored.state, str(source))
    if stored.images:
        model.pretrained_cfg = {**model.pretrained_cfg, **stored.images}  # type: ignore[assignment,dict-item]
    if stored.class_names is not None and len(stored.class_names) == getattr(model, "num_classes", 0):
        name_classes(model, stored.class_names)
    if feature is not None:
        if feature != "best" or not isinstance(model, NepaViT):
            raise ValueError(f"feature={feature!r}: 'best' is all there is, for NEPA predictors.")
        model.best_feature = read_best_feature(source, model)
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


def check_same_order(stored: Mapping[str, Any], model: Any, source: str) -> None:
    """Check that a model reads patches in the order that a checkpoint was trained in.

    The weights of every order fit every other, and mean something else there.

    Args:
        stored: The arguments with which the checkpoint's model was built.
        model: The model that takes its weights; one that has no order is not looked at.
        source: What to call the checkpoint in an error.

    Raises:
        CheckpointError: If it does not.
    """
    order, own = stored.get("order", "raster"), getattr(model, "order", None)
    if own is not None and own != order:
        raise CheckpointError(
            f"{source} was trained with patches in {order} order, and the model reads them in {own} order: give "
            f"backbone_args.order {order}. To go on in another on purpose, save load_backbone(...).set_order(...)."
        )


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


@dataclass(frozen=True)
class Stored:
    """What a checkpoint holds.

    Attributes:
        arch: timm's name of the architecture.
        args: Arguments of ``timm.create_model``.
        state: The weights under the model's names, on the CPU.
        names: Per weight of the model, its names in the file.
        class_names: Of a classifier, where the checkpoint has them.
        images: Mean, standard deviation and crop of the images, where they are not those of the architecture's name.
    """

    arch: str
    args: dict[str, Any]
    state: dict[str, Tensor]
    names: dict[str, tuple[str, ...]]
    class_names: list[str] | None = None
    images: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(source: str | Path, weights: Weights = "average") -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Return how to build a checkpoint's model, and its weights under that model's names.

    Args:
        source: As for :func:`load_backbone`.
        weights: As for :func:`load_backbone`.

    Returns:
        ``(timm name, arguments of timm.create_model, state_dict)``; the tensors are on the CPU.

    Raises:
        FileNotFoundError: If the source does not exist.
        CheckpointError: If it cannot be read.
    """
    stored = open_checkpoint(source, weights)
    return stored.arch, stored.args, stored.state


def open_checkpoint(source: str | Path, weights: Weights = "average") -> Stored:
    """Return what a checkpoint holds; arguments and errors as for :func:`read_checkpoint`."""
    if weights not in ("average", "raw"):
        raise ValueError(f"weights={weights!r} is neither 'average' nor 'raw'.")
    config, state, prefix = read_stored(source, weights)
    if config.get("model_type") == MODEL_TYPE:
        arch = "nepa_vit_base_patch14_224"
        try:
            args, names = args_from_nepa(config), class_names_from_nepa(config)
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error}") from None
        # Its blocks are counted under their own names only once their number is known.
        check_plausible(arch, args, state, str(source))
        own, origins = state_from_nepa(state, depth=args["depth"], gated=args["swiglu_mlp"])
        return Stored(arch, args, own, origins, names)
    args = config.get("model_args") or {}
    if not isinstance(args, dict):
        raise CheckpointError(f"{source}: `model_args` of its config must be a mapping, not {args!r}.")
    args = dict(args)
    for key in ("num_classes", "global_pool"):
        if key in config:
            args.setdefault(key, config[key])
    arch = config["architecture"]
    check_plausible(arch, args, state, str(source))
    if arch.startswith("nepa_vit_"):
        # ViT-L's name did not stand for QK-norm with a weight at first
        args["qk_norm_affine"] = "blocks.0.attn.q_norm.weight" in state
    places: dict[str, tuple[str, ...]] = {key: (prefix + key,) for key in state}
    return Stored(arch, args, state, places, _label_names(config, str(source)), _images(config, str(source)))


def _images(config: dict[str, Any], source: str) -> dict[str, Any]:
    """Return what a timm config says of its images: weights of one architecture were trained with several."""
    inner = config.get("pretrained_cfg")
    found = {key: inner[key] for key in ("mean", "std", "crop_pct") if key in inner} if isinstance(inner, dict) else {}
    for key, value in found.items():
        numbers = value if key != "crop_pct" and isinstance(value, list) else [value]
        right = all(isinstance(x, (int, float)) and math.isfinite(x) and x >= 0 for x in numbers)
        if not right or (key != "crop_pct") != isinstance(value, list) or (key != "mean" and 0 in numbers):
            raise CheckpointError(f"{source}: {key} = {value!r} in its config describes no images.")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


def _label_names(config: dict[str, Any], source: str) -> list[str] | None:
    """Return the class names of a timm config, which holds them itself or in its ``pretrained_cfg``."""
    inner = config.get("pretrained_cfg")
    names: Any = config.get("label_names") or (inner.get("label_names") if isinstance(inner, dict) else None)
    if isinstance(names, dict):
        names = [names.get(str(i)) for i in range(len(names))]
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{source}: label_names of its config is no list of names.")
    return names
