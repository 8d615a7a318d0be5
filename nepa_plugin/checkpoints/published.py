"""The layout of the published NEPA checkpoints: their ``config.json`` and the names of their weights."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nepa_plugin.checkpoints.class_names import class_names
from nepa_plugin.checkpoints.errors import CheckpointError, listing
from nepa_plugin.predictor import ACTIVATIONS, NepaViT

#: ``model_type`` of a published ``config.json``.
MODEL_TYPE = "vit_nepa"

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
#: Of masked pretraining, which no released model uses; the network reads it nowhere else.
_MASK_TOKEN = "vit_nepa.embeddings.mask_token"


def args_from_nepa(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``timm.create_model("nepa_vit_base_patch14_224")`` for a published config.

    What the config leaves out has the published implementation's default.

    Args:
        config: A published ``config.json``.

    Returns:
        The arguments.

    Raises:
        CheckpointError: If it lacks a size, or has an option that no released checkpoint uses.
    """
    required = (
        "image_size",
        "patch_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    )
    if absent := [key for key in required if key not in config]:
        raise CheckpointError(f"The published NEPA config misses {listing(absent)}.")
    for key in required:
        value = config[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{key} of the published NEPA config must be a positive whole number, not {value!r}.")
    classifier = "ViTNepaForImageClassification" in (config.get("architectures") or [])
    num_labels = len(config.get("id2label") or {}) or 2  # transformers leaves two labels out of the config
    pooled = bool(config.get("add_pooling_layer", False))
    unsupported = {
        key: config[key]
        for key, value in {"qkv_bias": True, "qk_norm_bias": False, "layer_norm_eps": 1e-12}.items()
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
        "mlp_act": config.get("hidden_act", "gelu"),
        "attention": "causal" if config.get("is_causal", True) else "bidirectional",
        "qk_norm": config.get("qk_norm", False),
        "qk_norm_affine": config.get("qk_norm_affine", False),
        # timm drops arguments that are None, so "off" is spelled as a number: 0 here, a factor of 1 below
        "init_values": config.get("layerscale_value", 1e-5) or 0.0,
        "rope_temperature": config.get("rope_theta", 100.0),
        "rope_rescale_coords": config.get("pos_embed_rescale", 2.0) or 1.0,
        "rope_shift_coords": config.get("pos_embed_shift"),
        "rope_jitter_coords": config.get("pos_embed_jitter"),
        "num_classes": num_labels if classifier else 0,
        **({"global_pool": "avg" if pooled else "last", "use_fc_norm": pooled} if classifier else {}),
    }


def class_names_from_nepa(config: Mapping[str, Any]) -> list[str] | None:
    """Return the class names of a published classifier's config, in their order; ``None`` where it has none.

    Raises:
        CheckpointError: If they are no mapping from 0, 1, ... to names.
    """
    names = config.get("id2label")
    if not names or "ViTNepaForImageClassification" not in (config.get("architectures") or []):
        return None
    if not isinstance(names, dict) or {str(key) for key in names} != {str(i) for i in range(len(names))}:
        raise CheckpointError("id2label of the published NEPA config must map 0, 1, ... to names.")
    by_number = {str(key): str(name) for key, name in names.items()}
    return [by_number[str(i)] for i in range(len(names))]


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


def state_from_nepa(
    published: Mapping[str, Tensor], depth: int, gated: bool
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """Return published weights under the names of :class:`~nepa_plugin.predictor.NepaViT`.

    Args:
        published: Tensors by their published names.
        depth: Number of transformer blocks.
        gated: Whether the MLP has a gate.

    Returns:
        The weights, and per weight its published names. What has no place in the model keeps its name, so that loading
        reports it as unexpected.

    Raises:
        CheckpointError: If only a part of a tensor that is several published ones is there.
    """
    state: dict[str, Tensor] = {}
    names: dict[str, tuple[str, ...]] = {}
    used = {_MASK_TOKEN} & set(published)
    if used:
        warnings.warn(f"{_MASK_TOKEN} is left out: it is for pretraining with masked inputs.", stacklevel=2)
    for own, prefixes in _key_pairs(depth, gated):
        for suffix in _suffixes(own):
            keys = [p + suffix for p in prefixes]
            found = [k for k in keys if k in published]
            if found and len(found) < len(keys):
                raise CheckpointError(f"The published checkpoint misses {listing(sorted(set(keys) - set(found)))}.")
            if found:
                state[own + suffix] = torch.cat([published[k] for k in keys]) if len(keys) > 1 else published[keys[0]]
                names[own + suffix] = tuple(keys)
                used.update(keys)
    others = {k: v for k, v in published.items() if k not in used}
    return state | others, names | {k: (k,) for k in others}


def nepa_names(weights: Iterable[str], depth: int, gated: bool) -> dict[str, tuple[str, ...]]:
    """Return the published names of a predictor's weights, several where they are parts of one.

    Args:
        weights: Names of the predictor's weights.
        depth: Number of transformer blocks.
        gated: Whether the MLP has a gate.
    """
    pairs: dict[str, tuple[str, ...]] = {}
    for own, published in _key_pairs(depth, gated):
        pairs |= {own + suffix: tuple(prefix + suffix for prefix in published) for suffix in _suffixes(own)}
    return {name: pairs[name] for name in weights if name in pairs}


def to_nepa(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a model in the published layout.

    Args:
        model: A ``NepaViT``.

    Returns:
        Its ``config.json``, and its weights by their published names.

    Raises:
        CheckpointError: If it is another model, or the layout cannot hold it.
    """
    if not isinstance(model, NepaViT):
        raise CheckpointError(f"The published layout holds NEPA predictors, not {type(model).__name__}.")
    if hasattr(model, "input_dim"):
        raise CheckpointError("The published layout holds models of images, not of other sequences.")
    if model.order != "raster":
        raise CheckpointError(f"The published layout has patches in raster order, not in {model.order} order.")
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
        raise CheckpointError(f"The published layout has no place for {listing(list(own))}.")
    normed = isinstance(block.attn.q_norm, nn.LayerNorm)
    activation = next((name for name, kind in ACTIVATIONS.items() if isinstance(block.mlp.act, kind)), None)
    pooled = (model.global_pool, isinstance(model.fc_norm, nn.LayerNorm))
    if model.num_classes and pooled not in (("avg", True), ("last", False)):
        raise CheckpointError(
            f"The published layout has no classifier with global_pool={pooled[0]!r} and use_fc_norm={pooled[1]}: it "
            "has the mean of the patch tokens with a norm, and the last token without."
        )
    config: dict[str, Any] = {
        "add_pooling_layer": not model.num_classes or pooled[0] == "avg",
        "architectures": ["ViTNepaForImageClassification" if model.num_classes else "ViTNepaForPreTraining"],
        "attention_probs_dropout_prob": 0.0,
        "drop_path_prob": 0.0,
        "dtype": str(model.cls_token.dtype).removeprefix("torch."),
        "hidden_act": activation,
        "hidden_dropout_prob": 0.0,
        "hidden_size": model.embed_dim,
        "image_size": img_size[0],
        "initializer_range": 0.02,
        "intermediate_size": block.mlp.fc2.in_features,
        "is_causal": model.is_causal,
        "layer_norm_eps": model.norm.eps,
        "layerscale_value": None if block.gamma_1 is None else block.init_values,
        "model_type": MODEL_TYPE,
        "num_attention_heads": block.attn.num_heads,
        "num_channels": model.in_chans,
        "num_hidden_layers": len(model.blocks),
        "patch_size": patch_size[0],
        "pos_embed_jitter": model.rope.jitter_coords,
        "pos_embed_rescale": model.rope.rescale_coords,
        "pos_embed_shift": model.rope.shift_coords,
        "qk_norm": normed,
        "qk_norm_affine": normed and isinstance(block.attn.q_norm.weight, nn.Parameter),
        "qk_norm_bias": False,
        "qkv_bias": True,
        "rope_theta": model.rope.temperature,
        "transformers_version": "4.56.2",
        "use_gated_mlp": gated,
    }
    if model.num_classes:
        names = class_names(model) or [f"LABEL_{i}" for i in range(model.num_classes)]
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    return config, state
