"""What DINO and iBOT share: a teacher's assignments of views to prototypes, their temperature, and the recipe."""

from typing import Any

from lightly.loss import DINOLoss
from lightly.utils.scheduler import linear_warmup_schedule
from torch.optim import Optimizer

from nepa_plugin.methods.heads import PrototypeHead
from nepa_plugin.methods.momentum import MomentumMethod
from nepa_plugin.methods.multi_crop import MultiCrop
from nepa_plugin.runtime.ranges import Fraction, LearningRate, NonNegativeFloat, PositiveFloat, PositiveInt


class SelfDistillation(MultiCrop, MomentumMethod):
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
        student_temp: Temperature of the student.
        teacher_temp: Temperature of the teacher after its warm-up.
        warmup_teacher_temp: Temperature of the teacher at the start.
        warmup_teacher_temp_fraction: Linear warm-up of the temperature as a fraction of all steps.
        base_lr: Learning rate per 256 images of the global batch.
        min_lr: Learning rate at the end of the cosine.
        weight_decay: AdamW weight decay of matrices; biases, norms and LayerScale have none.
        final_weight_decay: Weight decay at the end of its own cosine.
        clip_grad_norm: Largest norm of the gradient (without the probe's); 0 turns clipping off.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.multi_crop.MultiCrop` and
            :class:`~nepa_plugin.methods.momentum.MomentumMethod`.

    Raises:
        ValueError: If a temperature is impossible, or as in these two.
    """

    exported = "teacher_backbone"

    def __init__(
        self,
        *args: Any,
        output_dim: PositiveInt = 65536,
        hidden_dim: PositiveInt = 2048,
        bottleneck_dim: PositiveInt = 256,
        norm_last_layer: bool = True,
        freeze_last_layer: int = 3,
        student_temp: PositiveFloat = 0.1,
        teacher_temp: PositiveFloat = 0.07,
        warmup_teacher_temp: PositiveFloat = 0.04,
        warmup_teacher_temp_fraction: Fraction = 0.125,
        base_lr: LearningRate = 7.5e-4,
        min_lr: LearningRate = 2e-6,
        weight_decay: NonNegativeFloat = 0.04,
        final_weight_decay: NonNegativeFloat | None = 0.4,
        clip_grad_norm: NonNegativeFloat = 0.3,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args,
            base_lr=base_lr,
            min_lr=min_lr,
            weight_decay=weight_decay,
            final_weight_decay=final_weight_decay,
            clip_grad_norm=clip_grad_norm,
            **kwargs,
        )
        if not (0 < warmup_teacher_temp <= teacher_temp and student_temp > 0):
            raise ValueError(
                f"warmup_teacher_temp={warmup_teacher_temp} must be in (0, teacher_temp={teacher_temp}], and "
                f"student_temp={student_temp} positive."
            )
        self.teacher_temp = teacher_temp
        self.warmup_teacher_temp = warmup_teacher_temp
        self.warmup_teacher_temp_fraction = warmup_teacher_temp_fraction
        self.head = PrototypeHead(
            self.backbone.num_features, hidden_dim, bottleneck_dim, output_dim, norm_last_layer, freeze_last_layer
        )
        self.teacher_head = self.momentum_copy(self.head)
        self.criterion = DINOLoss(output_dim, student_temp=student_temp)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Keep the prototypes as they are in the first epochs."""
        super().on_before_optimizer_step(optimizer)
        for head, _ in self.momentum_pairs():
            if isinstance(head, PrototypeHead):
                head.cancel_last_layer_gradients(self.current_epoch)

    def current_teacher_temp(self) -> float:
        """Return the teacher's temperature at this step; the first one where no trainer is attached."""
        if self._trainer is None:
            return self.warmup_teacher_temp
        warmup = int(self.warmup_teacher_temp_fraction * int(self.trainer.estimated_stepping_batches))
        return linear_warmup_schedule(self.trainer.global_step, warmup, self.warmup_teacher_temp, self.teacher_temp)
