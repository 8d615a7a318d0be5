"""What the methods that compare two views of whole images share: views, recipe, and the frozen patch projection."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from PIL import Image
from torch import Tensor, nn

from nepa_plugin.methods.base import Method
from nepa_plugin.methods.transforms import build_transform
from nepa_plugin.predictor import NepaViT
from nepa_plugin.runtime.ranges import FractionBelowOne, LearningRate, NonNegativeFloat


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


class WholeImage(Method):
    """Base of the methods that compare two augmented views of an image, with MoCo v3's recipe for ViT-B as defaults.

    Source: arXiv 2104.02057, section 4.2 and its authors' ViT-B command: AdamW, batch 4096, 1.5e-4 per 256 images,
    weight decay 0.1, 40 of 300 epochs of warm-up, no clipping, and a patch projection that stays random. Methods whose
    own papers have no ViT take this recipe, too.

    Args:
        freeze_patch_projection: Keep the patch projection random, which stabilises training.
        transform_args: Options of lightly's transform that differ from the method's, for both views.
        backbone: Name of a timm Vision Transformer; a ``nepa_vit_*`` needs bidirectional attention.
        pool: What one feature per image is: ``"mean"`` of the patch tokens, or the ``"class"`` token.
        base_lr: Learning rate per 256 images of the global batch.
        weight_decay: AdamW weight decay of matrices; biases, norms and LayerScale have none.
        betas: AdamW betas.
        warmup_fraction: Linear warm-up as a fraction of all steps.
        clip_grad_norm: Largest norm of the gradient (without the probe's); 0 turns clipping off.
        ema_decay: Decay of the moving average of the weights; off, these papers have none.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.base.Method`.

    Raises:
        ValueError: If the backbone's class token cannot see the image, or an option of the transform is unknown.
    """

    #: lightly's transform: from an image to two views.
    transform_class: ClassVar[Callable[..., Any]]

    def __init__(
        self,
        *args: Any,
        freeze_patch_projection: bool = True,
        transform_args: dict[str, Any] | None = None,
        backbone: str = "plain_vit_base_patch14_224",
        pool: Literal["mean", "class"] = "class",
        base_lr: LearningRate = 1.5e-4,
        weight_decay: NonNegativeFloat = 0.1,
        betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.999),
        warmup_fraction: FractionBelowOne = 40 / 300,
        clip_grad_norm: NonNegativeFloat = 0.0,
        ema_decay: FractionBelowOne | None = 0.0,
        **kwargs: Any,
    ) -> None:
        self.freeze_patch_projection = freeze_patch_projection
        super().__init__(
            *args,
            backbone=backbone,
            pool=pool,
            base_lr=base_lr,
            weight_decay=weight_decay,
            betas=betas,
            warmup_fraction=warmup_fraction,
            clip_grad_norm=clip_grad_norm,
            ema_decay=ema_decay,
            **kwargs,
        )
        self.transform_args = transform_args
        self.train_transform()  # a wrong option fails here

    def prepare_backbone(self, loaded: bool) -> None:
        """Check the class token, and freeze the patch projection where that is asked for."""
        check_class_token(self.backbone, self.pool, type(self).__name__)
        if self.freeze_patch_projection:
            freeze_patch_projection(self.backbone, initialize=not loaded)

    def train_transform(self) -> Callable[[Image.Image], list[Tensor]]:
        """Return the paper's augmentation at this model's image size: two views."""
        defaults = {"input_size": self.img_size, "normalize": self.normalize}
        views: Callable[[Image.Image], list[Tensor]] = build_transform(
            type(self).transform_class, defaults, self.transform_args
        )
        return views
