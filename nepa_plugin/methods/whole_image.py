"""What the methods that compare whole images share: checks of the backbone, and the frozen patch projection."""

from typing import Any

from torch import nn

from nepa_plugin.predictor import NepaViT


def check_class_token(vit: Any, pool: str, method: str) -> None:
    """Check that the class token can say something about the image where it is the feature.

    Args:
        vit: The backbone.
        pool: ``pool`` of the method.
        method: Name of the method, for the error.

    Raises:
        ValueError: If ``pool`` is ``"class"`` and the backbone has no class token, or one that sees only itself.
    """
    if pool != "class":
        return
    if isinstance(vit, NepaViT) and vit.is_causal:
        raise ValueError(
            f"{method} with pool='class' needs bidirectional attention: in a causal backbone the class token comes "
            "first and sees only itself. Set backbone_args: {attention: bidirectional}."
        )
    if not getattr(vit, "num_prefix_tokens", 0):
        raise ValueError(f"{method} with pool='class' needs a backbone with a class token. Set pool: mean.")


def freeze_patch_projection(vit: Any, initialize: bool = True) -> None:
    """Freeze the patch projection. Source: MoCo v3, arXiv 2104.02057, section 4.2; initialised as in its code.

    Args:
        vit: The backbone.
        initialize: Draw it from Glorot's uniform distribution first; ``False`` keeps loaded weights.

    Raises:
        ValueError: If the backbone has no patch projection that is one layer.
    """
    projection = getattr(getattr(vit, "patch_embed", None), "proj", None)
    if not isinstance(projection, nn.Conv2d):
        raise ValueError(
            f"{type(vit).__name__} has no patch projection of one layer that could stay frozen. Set "
            "freeze_patch_projection: false."
        )
    if initialize:
        nn.init.xavier_uniform_(projection.weight.data.flatten(1))  # a view: one row per output
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)
    projection.requires_grad_(False)


def any_size_args(backbone_args: dict[str, Any] | None, num_local_crops: int) -> dict[str, Any]:
    """Return ``backbone_args`` with which the backbone takes the smaller local views too."""
    return ({"dynamic_img_size": True} if num_local_crops else {}) | (backbone_args or {})


def whole_patches(crop_size: int | None, img_size: int, patch_size: int, at_224: int = 96) -> int:
    """Return the side of a local view in pixels.

    Args:
        crop_size: The user's choice, or ``None``.
        img_size: Side of a global view in pixels.
        patch_size: Patch size in pixels.
        at_224: The paper's side for global views of 224 pixels: without a choice the nearest whole number of patches
            in this proportion.

    Returns:
        The side, a multiple of the patch size.

    Raises:
        ValueError: If the user's choice is no multiple of the patch size.
    """
    size = crop_size or max(1, round(img_size * at_224 / 224 / patch_size)) * patch_size
    if size % patch_size or size < patch_size:
        raise ValueError(f"local_crop_size={crop_size} must be a multiple of the patch size {patch_size}.")
    return size
