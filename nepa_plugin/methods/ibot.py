"""iBOT: self-distillation of class tokens across views and of masked patches within them (arXiv 2111.07832)."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightly.loss import DINOLoss, IBOTPatchLoss
from lightly.models.utils import random_block_mask
from lightly.transforms.ibot_transform import IBOTTransform
from lightly.utils.scheduler import linear_warmup_schedule
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer

from nepa_plugin.methods import whole_image
from nepa_plugin.methods.heads import PrototypeHead
from nepa_plugin.methods.masked import check_maskable, masked_encoder, python_random_from_torch
from nepa_plugin.methods.momentum import MomentumMethod
from nepa_plugin.methods.transforms import NORMALIZE, build_transform

VIEWS: dict[str, Any] = {"global_crop_scale": (0.32, 1.0), "local_crop_scale": (0.05, 0.32)}


class IBOT(MomentumMethod):
    """Image BERT with an online tokenizer, with the authors' ViT-B recipe as defaults.

    DINO's loss on the class tokens of two global views and small local ones, plus the same kind of loss on the patches
    that are masked in the student's global views. The momentum encoder is exported. Source: arXiv 2111.07832,
    section 3 and the authors' arguments for ViT-B/16: batch 1024, learning rate 7.5e-4 per 256 after 10 of 400 epochs
    of warm-up, to 2e-6; weight decay 0.04 to 0.4; gradient norm 0.3; teacher temperature 0.04 to 0.07 in 50 epochs.

    Args:
        output_dim: Prototypes that class tokens and patches are assigned to.
        hidden_dim: Width of the projection head.
        bottleneck_dim: Width of the head's output before the prototypes.
        shared_head: One head for class tokens and patches, or one for each.
        norm_last_layer: Keep the prototypes at unit length.
        freeze_last_layer: Epochs in which the prototypes stay as they are.
        num_local_crops: Local views per image.
        local_crop_size: Side of a local view in pixels, in whole patches; about 96 / 224 of the image by default.
        batch_mask_ratio: Fraction of the global views that are masked.
        mask_ratio: Range of the fraction of patches that is masked in these.
        student_temp: Temperature of the student.
        teacher_temp: Temperature of the teacher after its warm-up.
        warmup_teacher_temp: Temperature of the teacher at the start.
        warmup_teacher_temp_fraction: Linear warm-up of the temperature as a fraction of all steps.
        patch_loss_weight: Weight of the patches' loss; the class tokens' has 1.
        transform_args: Options of lightly's ``IBOTTransform`` that differ from the recipe.
        backbone: Name of a timm ``VisionTransformer``.
        backbone_args: As in :class:`~nepa_plugin.methods.base.Method`; ``dynamic_img_size`` is on, for local views.
        drop_path_rate: As in the base.
        pool: What stands for an image in the first loss, and as in the base; the paper takes the class token.
        base_lr: As in the base.
        min_lr: As in the base.
        weight_decay: As in the base.
        final_weight_decay: As in the base.
        betas: As in the base.
        clip_grad_norm: As in the base.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.momentum.MomentumMethod`.

    Raises:
        ValueError: If the backbone is no ``VisionTransformer`` with what ``pool`` asks for, the local views have no
            whole number of patches, or the masks do not fit the grid of patches.
    """

    exported = "teacher_backbone"

    def __init__(
        self,
        *args: Any,
        output_dim: int = 8192,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        shared_head: bool = True,
        norm_last_layer: bool = True,
        freeze_last_layer: int = 3,
        num_local_crops: int = 10,
        local_crop_size: int | None = None,
        batch_mask_ratio: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        student_temp: float = 0.1,
        teacher_temp: float = 0.07,
        warmup_teacher_temp: float = 0.04,
        warmup_teacher_temp_fraction: float = 0.125,
        patch_loss_weight: float = 1.0,
        transform_args: dict[str, Any] | None = None,
        backbone: str = "plain_vit_base_patch14_224",
        backbone_args: dict[str, Any] | None = None,
        drop_path_rate: float = 0.1,
        pool: Literal["mean", "class"] = "class",
        base_lr: float = 7.5e-4,
        min_lr: float = 2e-6,
        weight_decay: float = 0.04,
        final_weight_decay: float | None = 0.4,
        betas: tuple[float, float] = (0.9, 0.999),
        clip_grad_norm: float = 0.3,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args,
            backbone=backbone,
            backbone_args=whole_image.any_size_args(backbone_args, num_local_crops),
            drop_path_rate=drop_path_rate,
            pool=pool,
            base_lr=base_lr,
            min_lr=min_lr,
            weight_decay=weight_decay,
            final_weight_decay=final_weight_decay,
            betas=betas,
            clip_grad_norm=clip_grad_norm,
            **kwargs,
        )
        vit = self.backbone
        check_maskable(vit, "iBOT")
        whole_image.check_class_token(vit, pool, "iBOT")
        patch, self.grid = vit.patch_embed.patch_size[0], vit.patch_embed.grid_size[0]
        self.local_crop_size = whole_image.whole_patches(local_crop_size, self.img_size, patch)
        self.smallest_mask = int(self.grid**2 * mask_ratio[0])
        if not (0 < batch_mask_ratio <= 1 and self.smallest_mask >= 1 and mask_ratio[0] <= mask_ratio[1] <= 1):
            raise ValueError(
                f"batch_mask_ratio={batch_mask_ratio} and mask_ratio={mask_ratio} must be fractions, the latter "
                f"ascending and at least one of the {self.grid**2} patches."
            )
        if not 0 < warmup_teacher_temp <= teacher_temp:
            raise ValueError(f"warmup_teacher_temp={warmup_teacher_temp} must be in (0, teacher_temp={teacher_temp}].")
        self.num_local_crops = num_local_crops
        self.batch_mask_ratio = batch_mask_ratio
        self.mask_ratio = mask_ratio
        self.teacher_temp = teacher_temp
        self.warmup_teacher_temp = warmup_teacher_temp
        self.warmup_teacher_temp_fraction = warmup_teacher_temp_fraction
        self.patch_loss_weight = patch_loss_weight
        self.transform_args = transform_args
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.embed_dim))
        size = vit.embed_dim, hidden_dim, bottleneck_dim, output_dim, norm_last_layer, freeze_last_layer
        self.head = PrototypeHead(*size)
        self.teacher_head = self.momentum_copy(self.head)
        self.patch_head: PrototypeHead | None = None
        self.teacher_patch_head: PrototypeHead | None = None
        if not shared_head:
            self.patch_head = PrototypeHead(*size)
            self.teacher_patch_head = self.momentum_copy(self.patch_head)
        self.class_criterion = DINOLoss(output_dim, student_temp=student_temp)
        self.patch_criterion = IBOTPatchLoss(output_dim, student_temp=student_temp)
        self.train_transform()  # a wrong option fails here
        self.save_hyperparameters(logger=False)

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the backbone and the heads with their momentum copies."""
        pairs: list[tuple[nn.Module, nn.Module]] = super().momentum_pairs()
        pairs.append((self.head, self.teacher_head))
        if self.patch_head is not None and self.teacher_patch_head is not None:
            pairs.append((self.patch_head, self.teacher_patch_head))
        return pairs

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Keep the prototypes as they are in the first epochs."""
        super().on_before_optimizer_step(optimizer)
        for head in (self.head, self.patch_head):
            if head is not None:
                head.cancel_last_layer_gradients(self.current_epoch)

    def train_transform(self) -> Callable[[Image.Image], list[Tensor]]:
        """Return the authors' augmentation at this model's image size: two global views, then the local ones."""
        defaults = VIEWS | {
            "global_crop_size": self.img_size,
            "local_crop_size": self.local_crop_size,
            "n_local_views": self.num_local_crops,
            "normalize": self.normalize,
        }
        views: Callable[[Image.Image], list[Tensor]] = build_transform(IBOTTransform, defaults, self.transform_args)
        return views

    def step(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss of two global views (B, C, H, W) and any local ones, and the teacher's features (B, D)."""
        batch, images = len(views[0]), torch.cat(views[:2])
        mask = self.draw_masks(len(images)).to(images.device)
        patch_mask = mask.flatten(1)
        with torch.no_grad():
            teacher = self.teacher_backbone.forward_features(images)
            targets = self.project(teacher, patch_mask, self.teacher_head, self.teacher_patch_head)
        student = self.encode(images, patch_mask)
        class_logits, patch_logits = self.project(student, patch_mask, self.head, self.patch_head)
        classes = list(class_logits.split(batch))
        if len(views) > 2:
            locals_ = masked_encoder(self.backbone).encode(torch.cat(views[2:]))
            classes += self.head(self.pooled(locals_)).split(batch)
        temp = self.current_teacher_temp()
        loss = self.class_criterion(list(targets[0].split(batch)), classes, teacher_temp=temp)
        patch_loss = self.patch_criterion(targets[1], patch_logits, mask, teacher_temp=temp)
        return loss + self.patch_loss_weight * patch_loss, self.pooled(teacher[:batch])

    def encode(self, images: Tensor, patch_mask: Tensor) -> Tensor:
        """Return the student's tokens (B, T, D), with the patches where ``patch_mask`` (B, N) is set masked."""
        prefix = patch_mask.new_zeros(len(images), self.backbone.num_prefix_tokens)
        encoder = masked_encoder(self.backbone, self.mask_token)
        return encoder.encode(images, mask=torch.cat([prefix, patch_mask], dim=1))

    def project(
        self, tokens: Tensor, patch_mask: Tensor, head: nn.Module, patch_head: nn.Module | None
    ) -> tuple[Tensor, Tensor]:
        """Return the logits (B, K) of the images, and (M, K) of the patches that ``patch_mask`` (B, N) marks."""
        patches = tokens[:, self.backbone.num_prefix_tokens :][patch_mask]
        return head(self.pooled(tokens)), (head if patch_head is None else patch_head)(patches)

    def draw_masks(self, batch_size: int) -> Tensor:
        """Draw block masks (B, grid, grid) on the CPU. Some patch of the batch is always masked."""
        with python_random_from_torch():
            masks = random_block_mask(
                (batch_size, self.grid, self.grid),
                batch_mask_ratio=self.batch_mask_ratio,
                min_image_mask_ratio=self.mask_ratio[0],
                max_image_mask_ratio=self.mask_ratio[1],
                min_num_masks_per_block=min(4, self.smallest_mask),
            )
        if not masks.any():  # the mean over no patch is no number
            masks[0, 0, 0] = True
        return masks

    def current_teacher_temp(self) -> float:
        """Return the teacher's temperature at this step; the first one where no trainer is attached."""
        if self._trainer is None:
            return self.warmup_teacher_temp
        warmup = int(self.warmup_teacher_temp_fraction * int(self.trainer.estimated_stepping_batches))
        return linear_warmup_schedule(self.trainer.global_step, warmup, self.warmup_teacher_temp, self.teacher_temp)


transform = IBOTTransform(**VIEWS, local_crop_size=98, normalize=NORMALIZE)
