"""How a method is optimized: parameter groups, schedule, clipping, moving average, sharding."""

import math
from typing import Any

import torch
from lightly.utils.optim import update_param_groups
from lightly.utils.scheduler import CosineWarmupScheduler, cosine_schedule
from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from nepa_plugin.runtime.averaging import FusedEMA
from nepa_plugin.runtime.sharding import ShardedStrategy, full_tensor, local_tensor


class DivergenceError(RuntimeError):
    """Training has left the finite numbers; the message says when and what to do."""


class Schedule(CosineWarmupScheduler):
    """lightly's schedule, of which a checkpoint restores the position only.

    Length, peak and warm-up are those of the run as it is asked for now, and so are the options of the parameter groups
    (betas, weight decay), for which torch would take the checkpoint's. With the same options a run goes on exactly.

    Args:
        optimizer: The optimizer; its groups hold the options in force.
        warmup_steps: Linear warm-up.
        steps: Optimizer steps of the run.
        end_value: Learning rate at the end over the largest one.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, steps: int, end_value: float) -> None:
        super().__init__(optimizer, warmup_epochs=warmup_steps, max_epochs=steps, end_value=end_value)
        self._options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    def scale_lr(self, epoch: int) -> float:
        """Return the factor of the largest learning rate at a step; after the end, that of the end."""
        return super().scale_lr(min(epoch, self.max_epochs))

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what schedule it is one in."""
        state: dict[str, Any] = super().state_dict()
        del state["_options"]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the position, and say what is different from now on."""
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        self._last_lr = [base * self.scale_lr(self.last_epoch) for base in self.base_lrs]
        for group, options, lr in zip(self.optimizer.param_groups, self._options, self._last_lr, strict=True):
            group.update(options, lr=lr)
        before, now = (self._numbers(state) for state in (state_dict, self.__dict__))
        changed = [
            f"{name} {value:.4g} instead of {before[name]:.4g}"
            for name, value in now.items()
            if not math.isclose(value, before[name], rel_tol=1e-9)
        ]
        if changed:
            rank_zero_warn(
                f"Resumed after step {self.last_epoch} with {', '.join(changed)}. The steps so far were trained with "
                f"the old schedule; the learning rate goes on with {self._last_lr[0]:.4g}, where the old one had "
                f"{state_dict['_last_lr'][0]:.4g}."
            )

    @staticmethod
    def _numbers(state: dict[str, Any]) -> dict[str, float]:
        peak = state["base_lrs"][0]
        return {
            "steps": state["max_epochs"],
            "warm-up steps": state["warmup_epochs"],
            "learning rate": peak,
            "last learning rate": peak * state["end_value"],
        }


class OptimizedModule(LightningModule):
    """AdamW with two weight-decay groups, linear warm-up and cosine, clipping by norm, and a moving average.

    The numbers are attributes that :class:`~nepa_plugin.methods.base.Method` sets from its arguments of the same names.
    """

    batch_size_per_device: int
    base_lr: float
    min_lr: float
    weight_decay: float
    final_weight_decay: float | None
    betas: tuple[float, float]
    warmup_fraction: float
    warmup_steps: int | None
    clip_grad_norm: float
    ema_decay: float | None
    nonfinite_steps: int
    #: The probe, which has a learning rate but no weight decay, and no part in clipping.
    online_classifier: Any
    #: Whether a loss since the last step was not finite, and how many steps were not: on the device, read with the log.
    _nonfinite_loss: Tensor | None = None
    _nonfinite: Tensor | None = None
    _checked_step = 0

    @property
    def global_batch_size(self) -> int:
        """Images per optimizer step: per device x devices x accumulated batches."""
        return self.batch_size_per_device * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def configure_model(self) -> None:
        """Shard the weights where the trainer's strategy asks for it."""
        if self._trainer is not None and isinstance(self.trainer.strategy, ShardedStrategy):
            self.trainer.strategy.shard(self)

    def configure_callbacks(self) -> list[Callback]:
        """Attach the moving average, also where a user builds the trainer."""
        return [FusedEMA(self.ema_decay)] if self.averaged else []

    @property
    def averaged(self) -> bool:
        """Whether the weights have a moving average."""
        return self.ema_decay is None or self.ema_decay > 0

    def _own_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the trainable parameters without the probe's."""
        return [
            (name, p)
            for name, p in self.named_parameters()
            if p.requires_grad and not name.startswith("online_classifier.")
        ]

    def configure_optimizers(self) -> Any:
        """Return AdamW with weight-decay groups, and linear warm-up then cosine to zero, per step."""
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("The schedule needs an end: set trainer.max_epochs or trainer.max_steps.")
        steps = int(steps)
        lr = self.base_lr * self.global_batch_size / 256
        groups: dict[str, dict[str, Any]] = {
            "decay": {"name": "decay", "params": [], "weight_decay": self.weight_decay},
            "no_decay": {"name": "no_decay", "params": [], "weight_decay": 0.0},
        }
        for name, parameter in self._own_parameters():
            matrix = parameter.ndim > 1 and not name.endswith(".bias")
            groups["decay" if matrix else "no_decay"]["params"].append(parameter)
        if self.online_classifier is not None:
            probe = list(self.online_classifier.parameters())
            groups["probe"] = {"name": "online_classifier", "params": probe, "weight_decay": 0.0}
        optimizer = AdamW(
            [g for g in groups.values() if g["params"]],
            lr=lr,
            betas=(self.betas[0], self.betas[1]),
            fused=self._fused_optimizer or None,
        )
        warmup = self._clamped_warmup(steps)
        self._announce(lr, steps, warmup)
        end = self.min_lr / lr if lr else 0.0
        return [optimizer], [{"scheduler": Schedule(optimizer, warmup, steps, end), "interval": "step"}]

    @property
    def _fused_optimizer(self) -> bool:
        # With float16's loss scaling, a fused optimizer would unscale the gradients itself, after they were clipped.
        return self.device.type == "cuda" and self.trainer.precision != "16-mixed"

    def _clamped_warmup(self, steps: int) -> int:
        warmup = round(self.warmup_fraction * steps) if self.warmup_steps is None else self.warmup_steps
        if warmup >= steps:
            rank_zero_warn(f"The run has {steps} steps, its warm-up {warmup}: the warm-up is clamped to {steps // 2}.")
            warmup = steps // 2
        return warmup

    def _announce(self, lr: float, steps: int, warmup: int) -> None:
        trainer = self.trainer
        rank_zero_info(
            f"Global batch {self.global_batch_size} = {self.batch_size_per_device} per device x {trainer.world_size} "
            f"device(s) x {trainer.accumulate_grad_batches} accumulated. Learning rate {lr:.3g} = {self.base_lr:.3g} x "
            f"{self.global_batch_size} / 256, over {steps} steps, {warmup} of them warm-up."
        )

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Move the weight decay along its schedule."""
        if self.final_weight_decay is None:
            return
        step, steps = self.trainer.global_step, int(self.trainer.estimated_stepping_batches)
        value = cosine_schedule(min(step, steps), steps, self.weight_decay, self.final_weight_decay)
        update_param_groups(optimizer, updates=[{"name": "decay", "weight_decay": value}])

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient by its norm; log the norm, and the learning rate of the step that follows.

        The probe has its own loss, so its gradient does not count. Steps that are not finite are counted, and read with
        the log: until then, nothing waits for the device.
        """
        limit = self.clip_grad_norm if gradient_clip_val is None else gradient_clip_val
        parameters = [p for _, p in self._own_parameters()]
        norm = full_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if self._count_nonfinite(norm):
            norm = torch.nan_to_num(norm, 0.0, 0.0, 0.0)
        torch.nn.utils.clip_grads_with_norm_(parameters, limit or float("inf"), norm)
        self.log("grad_norm", norm)
        if self.is_logging_step:
            self.log("lr", optimizer.param_groups[0]["lr"])
            self.check_finite()

    def _count_nonfinite(self, norm: Tensor) -> bool:
        """Count the step if its loss or gradient is not finite; return whether such a gradient was set to zero."""
        # Under float16 the loss is scaled until gradients overflow, and its scaler leaves such a step out.
        scaled = self._trainer is not None and self.trainer.precision == "16-mixed"
        bad = torch.zeros_like(norm, dtype=torch.bool) if scaled else ~norm.isfinite()
        if self._nonfinite_loss is not None:
            bad = bad | self._nonfinite_loss
            self._nonfinite_loss = None
        self._nonfinite = bad.long() if self._nonfinite is None else self._nonfinite + bad
        if not self.nonfinite_steps:
            return False
        gradients = [local_tensor(p.grad) for p in self.parameters() if p.grad is not None]
        for gradient in gradients:
            gradient.masked_fill_(bad, 0.0)
        return True

    def check_finite(self, weights: bool = False) -> None:
        """Read the count of steps that were not finite; every process must call this after the same step.

        Args:
            weights: Look at the weights, too.

        Raises:
            DivergenceError: If there were more than are tolerated, or a weight is not finite.
        """
        count = torch.zeros((), dtype=torch.long, device=self.device) if self._nonfinite is None else self._nonfinite
        broken = torch.zeros((), dtype=torch.long, device=self.device)
        if weights:
            broken = ~torch.stack([local_tensor(p.detach()).isfinite().all() for p in self.parameters()]).all()
        read = torch.stack([count, broken.long()])
        if self.trainer.world_size > 1:
            read = self.trainer.strategy.reduce(read, reduce_op="max")  # type: ignore[assignment]
        steps, broken_weights = read.tolist()
        step = self.trainer.global_step + (not weights)  # a log is read within its step, a checkpoint after it
        if steps > self.nonfinite_steps or broken_weights:
            found = f"{steps} step(s) had a loss or gradient that is not finite" if steps else "a weight is not finite"
            raise DivergenceError(
                f"Training has diverged: {found}, after step {self._checked_step} and no later than step {step}. The "
                f"checkpoint before that is kept. Lower base_lr (now {self.base_lr:g}), warm up longer, or clip harder "
                f"(clip_grad_norm, now {self.clip_grad_norm:g}), and go on from it with --ckpt_path last. Single bad "
                "batches are passed over with nonfinite_steps."
            )
        self._checked_step = step

    @property
    def is_logging_step(self) -> bool:
        """Whether this step's values are written; anything costly to compute is computed only then."""
        return self._trainer is not None and (self.trainer.global_step + 1) % self._log_every == 0

    @property
    def _log_every(self) -> int:
        return int(getattr(self.trainer, "log_every_n_steps", 50))
