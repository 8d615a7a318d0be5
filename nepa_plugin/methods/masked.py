"""What the methods that hide patches share: lightly's masked wrapper around timm's ViT, the single view, their base."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from lightly.models.modules import MaskedVisionTransformerTIMM
from lightly.models.utils import initialize_2d_sine_cosine_positional_embedding
from lightly.transforms import AIMTransform, MAETransform
from lightly.transforms.ijepa_transform import IJEPATransform
from lightly.transforms.torchvision_v2_compatibility import torchvision_transforms as T
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from nepa_plugin.methods.base import Method
from nepa_plugin.methods.transforms import NORMALIZE
from nepa_plugin.runtime.ranges import Fraction, PositiveInt, Scale, check_ranges


def check_maskable(vit: nn.Module, method: str) -> None:
    """Check that a backbone is one that lightly's masked wrapper takes.

    Args:
        vit: The backbone.
        method: Name of the method, for the error.

    Raises:
        ValueError: If it is no timm ``VisionTransformer`` with a position embedding and a square grid of patches.
    """
    name = type(vit).__name__
    if not isinstance(vit, VisionTransformer):
        raise ValueError(
            f"{method} hides patches and needs timm's VisionTransformer, not {name}: set backbone to "
            "plain_vit_{tiny,small,base,large,huge}_patch14_224 (NEPA's sizes) or vit_base_patch16_224."
        )
    if vit.pos_embed is None:
        raise ValueError(f"{method} needs a backbone with a position embedding: remove pos_embed from backbone_args.")
    (height, width), (patch, _) = vit.patch_embed.img_size, vit.patch_embed.patch_size
    if height != width or height % patch:
        raise ValueError(
            f"{method} needs square images of whole patches, not {height}x{width} with patch_size {patch}."
        )


def masked_encoder(vit: VisionTransformer, mask_token: nn.Parameter | None = None) -> MaskedVisionTransformerTIMM:
    """Return lightly's masked wrapper around ``vit``. It holds the same weights, initialises none, and costs nothing.

    Made anew where it is needed instead of kept, so that every weight has one name in the method.

    Args:
        vit: The backbone.
        mask_token: What stands in for a masked patch, (1, 1, D); needed where ``encode`` is given a mask.

    Returns:
        The wrapper; its ``encode`` maps images (B, C, H, W) to tokens (B, T, D) after the final norm.
    """
    encoder = MaskedVisionTransformerTIMM(
        vit, mask_token, weight_initialization="skip", pos_embed_initialization="skip"
    )
    encoder.set_grad_checkpointing(vit.grad_checkpointing)
    return encoder


def fix_position_embedding(vit: VisionTransformer, initialize: bool = True) -> None:
    """Freeze the position embedding.

    Args:
        vit: The backbone.
        initialize: Set it to the 2D sine-cosine embedding first; ``False`` keeps loaded weights.

    Raises:
        ValueError: If the width is no multiple of 4, which the embedding needs.
    """
    if initialize:
        if vit.embed_dim % 4:
            raise ValueError(
                f"The sine-cosine position embedding needs a multiple of 4 as embed_dim, got {vit.embed_dim}."
            )
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        initialize_2d_sine_cosine_positional_embedding(vit.pos_embed, num_prefix_tokens=prefix)
    vit.pos_embed.requires_grad_(False)


def with_prefix(patches: Tensor, num_prefix_tokens: int) -> Tensor:
    """Turn indices of patches (B, K) into indices of tokens (B, P + K): the P prefix tokens, then these patches."""
    prefix = torch.arange(num_prefix_tokens, device=patches.device).expand(len(patches), -1)
    return torch.cat([prefix, patches + num_prefix_tokens], dim=1)


class SingleView:
    """lightly's one-view augmentation (crop, flip, normalisation) with a crop range and flip probability of choice.

    Args:
        cls: lightly's transform.
        input_size: Side of the view in pixels.
        crop_scale: Range of the crop's area as a fraction of the image.
        hflip_prob: Probability of a horizontal flip.
        normalize: ``mean`` and ``std`` per channel.

    Raises:
        ValueError: If the crop range or the probability is impossible.
    """

    def __init__(
        self,
        cls: type[MAETransform] | type[AIMTransform] | type[IJEPATransform],
        input_size: PositiveInt = 224,
        crop_scale: Scale = (0.2, 1.0),
        hflip_prob: Fraction = 0.5,
        normalize: dict[str, list[float]] = NORMALIZE,
    ) -> None:
        check_ranges(SingleView, {"input_size": input_size, "crop_scale": crop_scale, "hflip_prob": hflip_prob})
        low, high = crop_scale
        self.transform: Any = cls(input_size=input_size, min_scale=low, normalize=normalize).transform
        for step in self.transform.transforms:  # lightly fixes these two
            if isinstance(step, T.RandomResizedCrop):
                step.scale = (low, high)
            elif isinstance(step, T.RandomHorizontalFlip):
                step.p = hflip_prob

    def with_color_jitter(self, strength: float) -> "SingleView":
        """Change brightness, contrast and saturation at random after crop and flip; returns itself.

        Args:
            strength: The factors lie within so much of 1; 0 adds nothing.
        """
        if strength:
            steps = self.transform.transforms
            flip = max(i for i, step in enumerate(steps) if isinstance(step, T.RandomHorizontalFlip))
            steps.insert(flip + 1, T.ColorJitter(strength, strength, strength))
        return self

    def __call__(self, image: Image.Image) -> list[Tensor]:
        """Return a list with the one view (3, H, W)."""
        return [self.transform(image)]


class MaskedMethod(Method):
    """Base of the methods that hide patches of one view from a plain Vision Transformer with fixed positions.

    The position embedding is the 2D sine-cosine one, or that of ``init_from``, and is not trained.

    Args:
        crop_scale: Range of the random crop's area as a fraction of the image.
        hflip_prob: Probability of a horizontal flip.
        backbone: Name of a timm ``VisionTransformer``.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.base.Method`.

    Raises:
        ValueError: If the backbone is no ``VisionTransformer``, or the crop or the flip is impossible.
    """

    #: lightly's transform of the method, and the method's name in errors.
    transform_class: ClassVar[type[MAETransform] | type[AIMTransform] | type[IJEPATransform]]
    title: ClassVar[str]

    def __init__(
        self,
        *args: Any,
        crop_scale: Scale = (0.2, 1.0),
        hflip_prob: Fraction = 0.5,
        backbone: str = "plain_vit_base_patch14_224",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, backbone=backbone, **kwargs)
        self.crop_scale = crop_scale
        self.hflip_prob = hflip_prob
        self.train_transform()  # a wrong option fails here

    def prepare_backbone(self, loaded: bool) -> None:
        """Check that patches can be hidden, and fix the position embedding."""
        check_maskable(self.backbone, self.title)
        fix_position_embedding(self.backbone, initialize=not loaded)

    def train_transform(self) -> Callable[[Image.Image], list[Tensor]]:
        """Return the authors' augmentation at this model's image size."""
        return SingleView(self.transform_class, self.img_size, self.crop_scale, self.hflip_prob, self.normalize)
