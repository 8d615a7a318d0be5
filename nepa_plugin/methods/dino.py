"""DINO: self-distillation from two global views to these and to local ones (arXiv 2104.14294)."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightly.loss import DINOLoss
from lightly.transforms import DINOTransform
from lightly.utils.scheduler import linear_warmup_schedule
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer

from nepa_plugin.methods import whole_image
from nepa_plugin.methods.heads import PrototypeHead
from nepa_plugin.methods.momentum import MomentumMethod
from nepa_plugin.methods.transforms import NORMALIZE, build_transform

VIEWS: dict[str, Any] = {"global_crop_scale": (0.25, 1.0), "local_crop_scale": (0.05, 0.25)}


class DINO(MomentumMethod):
    """Self-distillation with no labels, with the authors' ViT-B/16 recipe as defaults.

    Every view of the student is matched with the teacher's output for the other global views; the teacher, a momentum
    encoder, is exported. Source: arXiv 2104.14294, section 3, and the authors' arguments for ViT-B/16: batch 1024,
    7.5e-4 per 256 images after 10 of 400 epochs of warm-up, to 2e-6; weight decay 0.04 to 0.4; ten local views;
    teacher temperature 0.04 to 0.07 in 50 epochs. They clip each tensor's gradient at 0.3, here it is the norm of all.

    Args:
        output_dim: Prototypes that the views are assigned to.
        hidden_dim: Width of the projection head.
        bottleneck_dim: Width of the head's output before the prototypes.
        norm_last_layer: Keep the prototypes at unit length.
        freeze_last_layer: Epochs in which the prototypes stay as they are.
        num_local_crops: Local views per image.
        local_crop_size: Side of a local view in pixels, in whole patches; about 96 / 224 of the image by default.
        student_temp: Temperature of the student.
        teacher_temp: Temperature of the teacher after its warm-up.
        warmup_teacher_temp: Temperature of the teacher at the start.
        warmup_teacher_temp_fraction: Linear warm-up of the temperature as a fraction of all steps.
        transform_args: Options of lightly's ``DINOTransform`` that differ from the recipe.
        backbone: Name of a timm Vision Transformer; a ``nepa_vit_*`` needs bidirectional attention.
        backbone_args: As in :class:`~nepa_plugin.methods.base.Method`; ``dynamic_img_size`` is on, for local views.
        drop_path_rate: As in the base.
        pool: As in the base.
        base_lr: As in the base.
        min_lr: As in the base.
        weight_decay: As in the base.
        final_weight_decay: As in the base.
        betas: As in the base.
        clip_grad_norm: As in the base.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.momentum.MomentumMethod`.

    Raises:
        ValueError: If the backbone's class token cannot see the image, the local views have no whole number of patches,
            a temperature is impossible, or an option of the transform is unknown.
    """

    exported = "teacher_backbone"

    def __init__(
        self,
        *args: Any,
        output_dim: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
        freeze_last_layer: int = 3,
        num_local_crops: int = 10,
        local_crop_size: int | None = None,
        student_temp: float = 0.1,
        teacher_temp: float = 0.07,
        warmup_teacher_temp: float = 0.04,
        warmup_teacher_temp_fraction: float = 0.125,
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
        whole_image.check_class_token(self.backbone, pool, "DINO")
        if not (0 < warmup_teacher_temp <= teacher_temp and student_temp > 0):
            raise ValueError(
                f"warmup_teacher_temp={warmup_teacher_temp} must be in (0, teacher_temp={teacher_temp}], and "
                f"student_temp={student_temp} positive."
            )
        patch_size = self.backbone.patch_embed.patch_size[0]
        self.local_crop_size = whole_image.whole_patches(local_crop_size, self.img_size, patch_size)
        self.num_local_crops = num_local_crops
        self.teacher_temp = teacher_temp
        self.warmup_teacher_temp = warmup_teacher_temp
        self.warmup_teacher_temp_fraction = warmup_teacher_temp_fraction
        self.transform_args = transform_args
        self.head = PrototypeHead(
            self.backbone.num_features,
            hidden_dim,
            bottleneck_dim,
            output_dim,
            norm_last_layer=norm_last_layer,
            freeze_last_layer=freeze_last_layer,
        )
        self.teacher_head = self.momentum_copy(self.head)
        self.criterion = DINOLoss(output_dim, student_temp=student_temp)
        self.train_transform()  # a wrong option fails here
        self.save_hyperparameters(logger=False)

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return backbone and head with their momentum copies."""
        return [*super().momentum_pairs(), (self.head, self.teacher_head)]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Keep the prototypes as they are in the first epochs."""
        super().on_before_optimizer_step(optimizer)
        self.head.cancel_last_layer_gradients(self.current_epoch)

    def train_transform(self) -> Callable[[Image.Image], list[Tensor]]:
        """Return the authors' augmentation at this model's image size: two global views, then the local ones."""
        defaults = VIEWS | {
            "global_crop_size": self.img_size,
            "local_crop_size": self.local_crop_size,
            "n_local_views": self.num_local_crops,
            "normalize": self.normalize,
        }
        views: Callable[[Image.Image], list[Tensor]] = build_transform(DINOTransform, defaults, self.transform_args)
        return views

    def step(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss of two global views (B, C, H, W) and any local ones, and the teacher's features (B, D)."""
        batch, images = len(views[0]), torch.cat(views[:2])
        with torch.no_grad():
            taught = self.pooled(self.teacher_backbone.forward_features(images))
            targets = self.teacher_head(taught).split(batch)
        features = [self.pooled(self.backbone.forward_features(images))]
        if len(views) > 2:
            features.append(self.pooled(self.backbone.forward_features(torch.cat(views[2:]))))
        logits = self.head(torch.cat(features)).split(batch)
        loss = self.criterion(list(targets), list(logits), teacher_temp=self.current_teacher_temp())
        return loss, taught[:batch]

    def current_teacher_temp(self) -> float:
        """Return the teacher's temperature at this step; the first one where no trainer is attached."""
        if self._trainer is None:
            return self.warmup_teacher_temp
        warmup = int(self.warmup_teacher_temp_fraction * int(self.trainer.estimated_stepping_batches))
        return linear_warmup_schedule(self.trainer.global_step, warmup, self.warmup_teacher_temp, self.teacher_temp)


transform = DINOTransform(**VIEWS, local_crop_size=98, n_local_views=10, normalize=NORMALIZE)
