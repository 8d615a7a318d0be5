"""What the methods with global and local views of an image share: the views, and a backbone that takes both sizes."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from PIL import Image
from torch import Tensor

from nepa_plugin.methods.base import Method
from nepa_plugin.methods.transforms import build_transform
from nepa_plugin.methods.whole_image import check_class_token
from nepa_plugin.runtime.ranges import FractionBelowOne, NonNegativeInt, PositiveInt


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


class MultiCrop(Method):
    """Base of the methods that compare two global views of an image and smaller local ones.

    Args:
        num_local_crops: Local views per image.
        local_crop_size: Side of a local view in pixels, in whole patches; by default the paper's for 224 pixels in
            proportion.
        transform_args: Options of the transform that differ from the authors'.
        backbone: Name of a timm Vision Transformer; a ``nepa_vit_*`` needs bidirectional attention.
        backbone_args: Further arguments of ``timm.create_model``; ``dynamic_img_size`` is on, for local views.
        drop_path_rate: Stochastic depth rate.
        pool: What stands for an image in the loss and for the probe: the ``"class"`` token, or the ``"mean"`` of the
            patch tokens.
        betas: AdamW betas.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.base.Method`.

    Raises:
        ValueError: If the backbone's class token cannot see the image, the local views have no whole number of patches,
            or an option of the transform is unknown.
    """

    #: The transform, the options of it in the method's recipe, and a local view's side for global ones of 224 pixels.
    transform_class: ClassVar[Callable[..., Any]]
    views: ClassVar[dict[str, Any]] = {}
    local_size_at_224: ClassVar[int] = 96

    def __init__(
        self,
        *args: Any,
        num_local_crops: NonNegativeInt = 10,
        local_crop_size: PositiveInt | None = None,
        transform_args: dict[str, Any] | None = None,
        backbone: str = "plain_vit_base_patch14_224",
        backbone_args: dict[str, Any] | None = None,
        drop_path_rate: FractionBelowOne = 0.1,
        pool: Literal["mean", "class"] = "class",
        betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.999),
        **kwargs: Any,
    ) -> None:
        any_size = {"dynamic_img_size": True} if num_local_crops else {}
        super().__init__(
            *args,
            backbone=backbone,
            backbone_args=any_size | (backbone_args or {}),
            drop_path_rate=drop_path_rate,
            pool=pool,
            betas=betas,
            **kwargs,
        )
        patch_size = self.backbone.patch_embed.patch_size[0]
        self.local_crop_size = whole_patches(local_crop_size, self.img_size, patch_size, self.local_size_at_224)
        self.num_local_crops = num_local_crops
        self.transform_args = transform_args
        self.train_transform()  # a wrong option fails here

    def prepare_backbone(self, loaded: bool) -> None:
        """Check the class token."""
        check_class_token(self.backbone, self.pool, type(self).__name__)

    def train_transform(self) -> Callable[[Image.Image], list[Tensor]]:
        """Return the authors' augmentation at this model's image size: two global views, then the local ones."""
        defaults = self.views | {
            "global_crop_size": self.img_size,
            "local_crop_size": self.local_crop_size,
            "n_local_views": self.num_local_crops,
            "normalize": self.normalize,
        }
        transform: Callable[[Image.Image], list[Tensor]] = build_transform(
            type(self).transform_class, defaults, self.transform_args
        )
        return transform
