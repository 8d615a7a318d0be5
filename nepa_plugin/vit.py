"""timm names of a plain Vision Transformer in the sizes of the ``nepa_vit_*`` names, for the methods that mask.

lightly's masked wrappers need timm's ``VisionTransformer``. These names give it what NEPA's predictor has and this
class can have: LayerScale, QK-norm, the same widths, depths, MLPs and image normalisation. What stays different is the
position embedding (absolute instead of RoPE), and QK-norm's weight and bias.
"""

import math
from typing import Any

from timm.layers import SwiGLU
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from nepa_plugin.predictor import MODEL_SIZES, default_cfg

default_cfgs = generate_default_cfgs(
    {f"plain_vit_{size}_patch14{mlp}_224": default_cfg() for size in MODEL_SIZES for mlp in ("", "_swiglu")}
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    size, swiglu = variant.split("_")[2], "_swiglu" in variant
    embed_dim, depth, num_heads = MODEL_SIZES[size]
    model_args: dict[str, Any] = {
        "patch_size": 14,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "num_classes": 0,
        "init_values": 1e-5,
        "qk_norm": True,
    }
    if swiglu:  # two thirds of the GELU MLP's hidden size, so that both have the same number of parameters
        model_args["mlp_ratio"] = math.ceil(embed_dim * 8 / 3 / 64) * 64 / embed_dim
        kwargs["mlp_layer"] = SwiGLU
    out_indices = kwargs.pop("out_indices", 3)
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **(model_args | kwargs),
    )
    return model


def _register(variant: str) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        return _create(variant, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = variant
    create.__doc__ = f"timm's VisionTransformer, {variant.removeprefix('plain_').removesuffix('_224')}."
    register_model(create)


for _variant in default_cfgs:
    _register(_variant)
