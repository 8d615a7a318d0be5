"""iBOT: self-distillation of class tokens across views and of masked patches within them (arXiv 2111.07832)."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from lightly.transforms.ibot_transform import IBOTTransform
from torch import Tensor, nn

from nepa_plugin.methods.distillation import SelfDistillation
from nepa_plugin.methods.heads import PrototypeHead
from nepa_plugin.methods.losses import PatchLoss
from nepa_plugin.methods.masked import check_maskable, masked_encoder
from nepa_plugin.methods.masks import PatchMasks
from nepa_plugin.methods.precision import in_float32
from nepa_plugin.methods.transforms import NORMALIZE
from nepa_plugin.runtime.ranges import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt


class IBOT(SelfDistillation):
    """Image BERT with an online tokenizer, with the authors' ViT-B recipe as defaults.

    DINO's loss on the class tokens of two global views and small local ones, plus the same kind of loss on the patches
    that are masked in the student's global views. Source: arXiv 2111.07832, section 3, and the authors' arguments for
    ViT-B/16; the recipe is that of :class:`~nepa_plugin.methods.distillation.SelfDistillation`.

    Args:
        output_dim: Prototypes that class tokens and patches are assigned to.
        hidden_dim: Width of the projection heads.
        bottleneck_dim: Width of the heads' outputs before the prototypes.
        shared_head: One head for class tokens and patches, or one for each.
        norm_last_layer: Keep the prototypes at unit length.
        freeze_last_layer: Epochs in which the prototypes stay as they are.
        batch_mask_ratio: Fraction of the global views that are masked.
        mask_ratio: Range of the fraction of patches that is masked in these.
        student_temp: Temperature of the student.
        patch_loss_weight: Weight of the patches' loss; the class tokens' has 1.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.distillation.SelfDistillation`.

    Raises:
        ValueError: If the backbone is no timm ``VisionTransformer``, the masks do not fit the grid of patches, or as
            there.
    """

    transform_class = IBOTTransform
    views: ClassVar = {"global_crop_scale": (0.32, 1.0), "local_crop_scale": (0.05, 0.32)}

    def __init__(
        self,
        *args: Any,
        output_dim: PositiveInt = 8192,
        hidden_dim: PositiveInt = 2048,
        bottleneck_dim: PositiveInt = 256,
        shared_head: bool = True,
        norm_last_layer: bool = True,
        freeze_last_layer: int = 3,
        batch_mask_ratio: Fraction = 0.5,
        mask_ratio: tuple[Fraction, Fraction] = (0.1, 0.5),
        student_temp: PositiveFloat = 0.1,
        patch_loss_weight: NonNegativeFloat = 1.0,
        **kwargs: Any,
    ) -> None:
        head: dict[str, Any] = {
            "hidden_dim": hidden_dim,
            "bottleneck_dim": bottleneck_dim,
            "output_dim": output_dim,
            "norm_last_layer": norm_last_layer,
            "freeze_last_layer": freeze_last_layer,
        }
        super().__init__(*args, student_temp=student_temp, **head, **kwargs)
        vit = self.backbone
        grid = vit.patch_embed.grid_size[0]
        smallest = int(grid**2 * mask_ratio[0])
        if not (0 < batch_mask_ratio <= 1 and smallest >= 1 and mask_ratio[0] <= mask_ratio[1] <= 1):
            raise ValueError(
                f"batch_mask_ratio={batch_mask_ratio} and mask_ratio={mask_ratio} must be fractions, the latter "
                f"ascending and at least one of the {grid**2} patches."
            )
        self.masks = PatchMasks(grid, batch_mask_ratio, mask_ratio, min(4, smallest))
        self.patch_loss_weight = patch_loss_weight
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.embed_dim))
        self.patch_head: PrototypeHead | None = None
        self.teacher_patch_head: PrototypeHead | None = None
        if not shared_head:
            self.patch_head = PrototypeHead(vit.embed_dim, **head)
            self.teacher_patch_head = self.momentum_copy(self.patch_head)
        self.patch_criterion = PatchLoss(output_dim, student_temp=student_temp)

    def prepare_backbone(self, loaded: bool) -> None:
        """Check that patches can be hidden, and the class token."""
        check_maskable(self.backbone, "iBOT")
        super().prepare_backbone(loaded)

    def step(self, views: list[Tensor], masks: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return the loss of two global views (B, C, H, W) and any local ones, and the teacher's features (B, D)."""
        batch, images = len(views[0]), torch.cat(views[:2])
        mask, masked, weights = self.drawn_masks(views[0], masks)
        with torch.no_grad():
            teacher = self.teacher_backbone.forward_features(images)
            targets = self.project(teacher, masked, self.teacher_head, self.teacher_patch_head)
        student = self.encode(images, mask)
        class_logits, patch_logits = self.project(student, masked, self.head, self.patch_head)
        classes = list(class_logits.split(batch))
        if len(views) > 2:
            locals_ = masked_encoder(self.backbone).encode(torch.cat(views[2:]))
            classes += self.head(self.pooled(locals_)).split(batch)
        temp = self.current_teacher_temp()
        loss = in_float32(self.criterion, list(targets[0].split(batch)), classes, teacher_temp=temp)
        patch_loss = in_float32(self.patch_criterion, targets[1], patch_logits, weights / len(images), temp)
        return loss + self.patch_loss_weight * patch_loss, self.pooled(teacher[:batch])

    def encode(self, images: Tensor, patch_mask: Tensor) -> Tensor:
        """Return the student's tokens (B, T, D), with the patches where ``patch_mask`` (B, N) is set masked."""
        prefix = patch_mask.new_zeros(len(images), self.backbone.num_prefix_tokens)
        encoder = masked_encoder(self.backbone, self.mask_token)
        return encoder.encode(images, mask=torch.cat([prefix, patch_mask], dim=1))

    def project(
        self, tokens: Tensor, masked: Tensor, head: nn.Module, patch_head: nn.Module | None
    ) -> tuple[Tensor, Tensor]:
        """Return the logits (B, K) of the images, and (M, K) of the masked patches, indices into all B x N."""
        patches = tokens[:, self.backbone.num_prefix_tokens :].flatten(0, 1)[masked]
        return head(self.pooled(tokens)), (head if patch_head is None else patch_head)(patches)


transform = IBOTTransform(**IBOT.views, local_crop_size=98, normalize=NORMALIZE)
