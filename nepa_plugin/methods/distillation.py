"""What DINO and iBOT share: a teacher's assignments of views to prototypes, their temperature, views and recipe."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from lightly.loss import DINOLoss
from lightly.utils.scheduler import linear_warmup_schedule
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer

from nepa_plugin.methods import whole_image
from nepa_plugin.methods.heads import PrototypeHead
from nepa_plugin.methods.momentum import MomentumMethod
from nepa_plugin.methods.transforms import build_transform


class SelfDistillation(MomentumMethod):
    """Base of self-distillation from two global views to these and to local ones; the teacher is exported.

    Source: DINO, arXiv 2104.14294, section 3, and its authors' arguments for ViT-B/16, which iBOT (arXiv 2111.07832)
    has taken over: batch 1024, 7.5e-4 per 256 images after 10 of 400 epochs of warm-up, to 2e-6; weight decay 0.04 to
    0.4; ten local views; teacher temperature 0.04 to 0.07 in 50 epochs. They clip each tensor's gradient at 0.3, here
    it is the norm of all.

    Args:
        output_dim: Prototypes that views are assigned to.
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
        transform_args: Options of lightly's transform that differ from the recipe.
        backbone: Name of a timm Vision Transformer; a ``nepa_vit_*`` needs bidirectional attention.
        backbone_args: As in :class:`~nepa_plugin.methods.base.Method`; ``dynamic_img_size`` is on, for local views.
        drop_path_rate: As in the base.
        pool: What stands for an image in the loss, and as in the base; the papers take the class token.
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
    #: lightly's transform, and the scales of its views in the method's recipe.
    transform_class: ClassVar[Callable[..., Any]]
    views: ClassVar[dict[str, Any]]

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
        self.check_backbone()
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
            self.backbone.num_features, hidden_dim, bottleneck_dim, output_dim, norm_last_layer, freeze_last_layer
        )
        self.teacher_head = self.momentum_copy(self.head)
        self.criterion = DINOLoss(output_dim, student_temp=student_temp)
        self.train_transform()  # a wrong option fails here

    def check_backbone(self) -> None:
        """Raise ``ValueError`` if the method cannot train this backbone."""
        whole_image.check_class_token(self.backbone, self.pool, type(self).__name__)

    def heads(self) -> list[tuple[PrototypeHead, PrototypeHead]]:
        """Return the student's heads with the teacher's."""
        return [(self.head, self.teacher_head)]

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the backbone and the heads with their momentum copies."""
        return [*super().momentum_pairs(), *self.heads()]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Keep the prototypes as they are in the first epochs."""
        super().on_before_optimizer_step(optimizer)
        for head, _ in self.heads():
            head.cancel_last_layer_gradients(self.current_epoch)

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

    def current_teacher_temp(self) -> float:
        """Return the teacher's temperature at this step; the first one where no trainer is attached."""
        if self._trainer is None:
            return self.warmup_teacher_temp
        warmup = int(self.warmup_teacher_temp_fraction * int(self.trainer.estimated_stepping_batches))
        return linear_warmup_schedule(self.trainer.global_step, warmup, self.warmup_teacher_temp, self.teacher_temp)
