"""The timm names: ``nepa_vit_*``, the predictor, and ``plain_vit_*``, a plain Vision Transformer of the same sizes.

lightly's masked wrappers need timm's ``VisionTransformer``. The plain names give it what NEPA's predictor has and this
class can have: LayerScale, QK-norm, the same widths, depths, MLPs and image normalisation. What stays different is the
position embedding (absolute instead of RoPE), and QK-norm's weight and bias.
"""

import math
from typing import Any, NamedTuple

from timm.layers import SwiGLU
from timm.models import build_model_with_cfg, eva, generate_default_cfgs, register_model, vision_transformer
from torch import nn

from nepa_plugin.predictor import NEPA_MEAN, NEPA_STD, NepaViT


class Size(NamedTuple):
    """Size of a Vision Transformer."""

    embed_dim: int
    depth: int
    num_heads: int


#: The usual ViT sizes; base and large are the published ones.
MODEL_SIZES: dict[str, Size] = {
    "tiny": Size(192, 12, 3),
    "small": Size(384, 12, 6),
    "base": Size(768, 12, 12),
    "large": Size(1024, 24, 16),
    "huge": Size(1280, 32, 16),
}


class Family(NamedTuple):
    """What the models of one family of names are built of."""

    cls: type[nn.Module]
    filter_fn: Any
    args: dict[str, Any]
    swiglu_args: dict[str, Any]


FAMILIES: dict[str, Family] = {
    "nepa_vit": Family(NepaViT, eva.checkpoint_filter_fn, {}, {"swiglu_mlp": True}),
    "plain_vit": Family(
        vision_transformer.VisionTransformer,
        vision_transformer.checkpoint_filter_fn,
        {"num_classes": 0, "init_values": 1e-5, "qk_norm": True},
        {"mlp_layer": SwiGLU},
    ),
}


def default_cfg(**kwargs: Any) -> dict[str, Any]:
    """Return timm's description of a model's images: 224 pixels, mean = std = 0.5."""
    return {
        "url": "",
        "num_classes": 0,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": NEPA_MEAN,
        "std": NEPA_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        **kwargs,
    }


def _register(family: str, size: str, swiglu: bool) -> str:
    """Register ``FAMILY_SIZE_patch14[_swiglu]_224`` with timm and return it."""
    name = f"{family}_{size}_patch14{'_swiglu' if swiglu else ''}_224"
    cls, filter_fn, args, swiglu_args = FAMILIES[family]
    model_args = {"patch_size": 14, **MODEL_SIZES[size]._asdict(), **args}
    if family == "nepa_vit" and size == "large":
        model_args["qk_norm_affine"] = True  # as published; the other sizes' QK-norm has no weight
    if swiglu:
        # Two thirds of the GELU MLP's hidden size (rounded up to 64), so that both have the same number of parameters.
        embed_dim = MODEL_SIZES[size].embed_dim
        model_args |= {**swiglu_args, "mlp_ratio": math.ceil(embed_dim * 8 / 3 / 64) * 64 / embed_dim}

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        model: nn.Module = build_model_with_cfg(
            cls,
            name,
            pretrained,
            pretrained_filter_fn=filter_fn,
            feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
            **(model_args | kwargs),
        )
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{cls.__name__}, {size}, patch 14, with {'SwiGLU' if swiglu else 'GELU'} MLP."
    register_model(create)
    return name


#: timm looks for this name in the module of a registered function.
default_cfgs = generate_default_cfgs(
    {
        f"{family}_{size}_patch14{mlp}_224": default_cfg()
        for family in FAMILIES
        for size in MODEL_SIZES
        for mlp in ("", "_swiglu")
    }
)
for _family in FAMILIES:
    for _size in MODEL_SIZES:
        for _swiglu in (False, True):
            _register(_family, _size, _swiglu)
