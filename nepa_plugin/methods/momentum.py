"""What the methods with a momentum encoder share: the encoder, its schedule and its update."""

import copy
import math
from typing import Any

from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.utils.scheduler import cosine_schedule
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import nn

from nepa_plugin.methods.base import Method
from nepa_plugin.runtime.averaging import MOST_FIRST_WEIGHTS
from nepa_plugin.runtime.ranges import Fraction, FractionBelowOne


class MomentumMethod(Method):
    """Base of the methods with a momentum encoder: a moving average of the backbone that gets no gradient.

    After every optimizer step each momentum weight becomes ``m * itself + (1 - m) * trained weight``, with m on a
    cosine from ``momentum`` to ``final_momentum``. A module that a method names ``teacher_X`` follows its ``X``: the
    backbone's is made here, those of heads with :meth:`momentum_copy`. The momentum backbone is always in evaluation
    mode, without drop path and RoPE's random rescaling; momentum heads are in the method's mode, so that their
    BatchNorm has the statistics of the batch, as in BYOL and MoCo v3. Source: BYOL, arXiv 2006.07733, section 3.2.

    Args:
        momentum: m at the start.
        final_momentum: m at the end.
        ema_decay: Decay of Lightning's moving average of all weights; off, as the momentum encoder is one already.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.base.Method`.

    Raises:
        ValueError: If a momentum is outside [0, 1].
    """

    def __init__(
        self,
        *args: Any,
        momentum: Fraction = 0.996,
        final_momentum: Fraction = 1.0,
        ema_decay: FractionBelowOne | None = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, ema_decay=ema_decay, **kwargs)
        self.momentum = momentum
        self.final_momentum = final_momentum
        # Lightning starts to train in the modes that it finds, and calls no train().
        self.teacher_backbone = self.momentum_copy(self.backbone).eval()

    @staticmethod
    def momentum_copy(module: nn.Module) -> Any:
        """Return a copy that gets no gradient."""
        teacher = copy.deepcopy(module)
        deactivate_requires_grad(teacher)
        return teacher

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (trained module, its momentum copy): every ``teacher_X`` with the ``X`` that it follows."""
        return [
            (self.get_submodule(name.removeprefix("teacher_")), teacher)
            for name, teacher in self.named_children()
            if name.startswith("teacher_")
        ]

    def train(self, mode: bool = True) -> "MomentumMethod":
        """Set the mode of everything but the momentum backbone."""
        super().train(mode)
        if hasattr(self, "teacher_backbone"):
            self.teacher_backbone.eval()
        return self

    def _momentum_at(self, step: int, steps: int) -> float:
        return float(cosine_schedule(min(step, steps), steps, self.momentum, self.final_momentum))

    def first_weights(self, steps: int) -> float:
        """Return which part of what is exported is the first weights still, after a run of so many steps."""
        if self.exported != "teacher_backbone":
            return 0.0
        return math.prod(self._momentum_at(step, steps) for step in range(steps))

    def on_train_start(self) -> None:
        """Say it if the run is too short for the momentum to forget the first weights."""
        super().on_train_start()
        steps = self.trainer.estimated_stepping_batches
        if steps < float("inf") and (left := self.first_weights(int(steps))) > MOST_FIRST_WEIGHTS:
            rank_zero_warn(
                f"With a momentum from {self.momentum} to {self.final_momentum} in {int(steps)} steps, {left:.0%} of "
                "the momentum encoder, which is exported, will be the first weights. Lower momentum and final_momentum."
            )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the optimizer's step, then the momentum encoder's."""
        step, steps = self.trainer.global_step, int(self.trainer.estimated_stepping_batches)
        super().optimizer_step(*args, **kwargs)
        m = self._momentum_at(step, steps)
        for student, teacher in self.momentum_pairs():
            update_momentum(student, teacher, m)
