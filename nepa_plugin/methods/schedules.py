"""Learning-rate schedules that a resumed run follows as it is asked for now."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from lightly.utils.scheduler import CosineWarmupScheduler
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class PositionOnly(LambdaLR):
    """A schedule of which a checkpoint restores the position only.

    Length, peak and warm-up are those of the run as it is asked for now, and so are the options of the parameter groups
    (betas, weight decay), for which torch would take the checkpoint's. With the same options a run goes on exactly.
    """

    def keep_options(self) -> None:
        """Remember the options of the optimizer's groups, which are those in force."""
        self._options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what schedule it is one in."""
        state: dict[str, Any] = super().state_dict()
        del state["_options"]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the position, and say what is different from now on."""
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        rates = zip(self.base_lrs, self.lr_lambdas, strict=True)
        self._last_lr = [base * factor(self.last_epoch) for base, factor in rates]
        for group, options, lr in zip(self.optimizer.param_groups, self._options, self._last_lr, strict=True):
            group.update(options, lr=lr)
        before, now = self._numbers(state_dict), self._numbers(self.__dict__)
        changed = [
            f"{name} {value:.4g} instead of {before[name]:.4g}"
            for name, value in now.items()
            if not math.isclose(value, before[name], rel_tol=1e-9)
        ]
        if changed:
            rank_zero_warn(
                f"Resumed after step {self.last_epoch} with {', '.join(changed)}. The steps so far were trained with "
                f"the old schedule; the learning rate goes on with {self._last_lr[self._shown]:.4g}, where the old one "
                f"had {state_dict['_last_lr'][self._shown]:.4g}."
            )

    #: The parameter group whose learning rate is said.
    _shown = 0

    @staticmethod
    def _numbers(state: dict[str, Any]) -> dict[str, float]:
        raise NotImplementedError


class Schedule(PositionOnly, CosineWarmupScheduler):
    """lightly's schedule, one for all groups.

    Args:
        optimizer: The optimizer; its groups hold the options in force.
        warmup_steps: Linear warm-up.
        steps: Optimizer steps of the run.
        end_value: Learning rate at the end over the largest one.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, steps: int, end_value: float) -> None:
        CosineWarmupScheduler.__init__(
            self, optimizer, warmup_epochs=warmup_steps, max_epochs=steps, end_value=end_value
        )
        self.keep_options()

    def scale_lr(self, epoch: int) -> float:
        """Return the factor of the largest learning rate at a step; after the end, that of the end."""
        return super().scale_lr(min(epoch, self.max_epochs))

    @staticmethod
    def _numbers(state: dict[str, Any]) -> dict[str, float]:
        peak = state["base_lrs"][0]
        return {
            "steps": state["max_epochs"],
            "warm-up steps": state["warmup_epochs"],
            "learning rate": peak,
            "last learning rate": peak * state["end_value"],
        }


class GroupSchedule(PositionOnly):
    """A schedule for each group.

    Args:
        optimizer: The optimizer; its groups hold the options in force.
        factors: Per group, from a step to the factor of its learning rate.
        asked: What a resumed run compares with its own, by name.
        shown: The group whose learning rate is said.
    """

    def __init__(
        self, optimizer: Optimizer, factors: Sequence[Callable[[int], float]], asked: dict[str, float], shown: int
    ) -> None:
        self.asked, self._shown = asked, shown
        super().__init__(optimizer, list(factors))
        self.keep_options()

    @staticmethod
    def _numbers(state: dict[str, Any]) -> dict[str, float]:
        return dict(state["asked"])
