"""How a method is optimized: parameter groups, clipping, moving average, sharding, compilation."""

from typing import Any

import torch
from lightly.utils.optim import update_param_groups
from lightly.utils.scheduler import cosine_schedule
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from nepa_plugin.methods.logged import LoggedModule
from nepa_plugin.methods.schedules import Schedule
from nepa_plugin.runtime.averaging import FusedEMA
from nepa_plugin.runtime.sharding import ShardedStrategy, full_tensor, local_tensor


class DivergenceError(RuntimeError):
    """Training has left the finite numbers; the message says when and what to do.

    Args:
        found: What is not finite, and when.
        advice: What to do.
    """

    def __init__(self, found: str, advice: str) -> None:
        self.found = found
        super().__init__(f"Training has diverged: {found}. {advice}")


class OptimizedModule(LoggedModule):
    """AdamW with two weight-decay groups, linear warm-up and cosine, clipping by norm, and a moving average.

    The numbers are attributes that :class:`~nepa_plugin.methods.base.Method` sets from its arguments of the same names.
    """

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
    #: What the option is called that scales the learning rate.
    rate = "base_lr"
    #: The probe, which has a learning rate but no weight decay, and no part in clipping.
    online_classifier: Any
    #: Whether a loss since the last step was not finite, and how many steps were not: on the device, read with the log.
    _nonfinite_loss: Tensor | None = None
    _nonfinite: Tensor | None = None
    _checked_step = 0

    def configure_model(self) -> None:
        """Shard the weights where the trainer's strategy asks for it."""
        if self._trainer is not None and isinstance(self.trainer.strategy, ShardedStrategy):
            self.trainer.strategy.shard(self)

    def compile_step(self, backend: str = "inductor") -> None:
        """Compile the training step with ``torch.compile``: every transformer block, and the loss, each in place.

        Blocks rather than the step as a whole: equal blocks share one compiled graph, so that compiling takes as long
        for 32 of them as for one; the gradients of a block are ready, and sent to the other devices, while the blocks
        before it are still in their backward pass; FSDP can shard between them; and what is random or only done when
        logging stays outside. State dicts, checkpoints and copies are those of the uncompiled method. Validation is
        not compiled.

        Args:
            backend: Backend of ``torch.compile``.
        """
        blocks = [
            block
            for name, modules in self.named_modules()
            if name.endswith("blocks") and isinstance(modules, nn.ModuleList | nn.Sequential)
            for block in modules
        ]
        for module in [*blocks, *(m for name, m in self.named_children() if name == "criterion")]:
            module.compile(backend=backend)
        # Blocks with stochastic depth differ by its rate, which is a constant in their graphs; each may have a training
        # graph and be asked for one more shape.
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, 2 * len(blocks))

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
            self.log_dict(self.rates(optimizer))
            self.check_finite()

    def rates(self, optimizer: Optimizer) -> dict[str, float]:
        """Return the learning rates to log, of the step that follows."""
        return {"lr": optimizer.param_groups[0]["lr"]}

    def note_loss(self, loss: Tensor, images: int) -> None:
        """Log the loss of a batch of so many images, and remember whether it is finite, without looking."""
        bad = ~loss.detach().isfinite()
        self._nonfinite_loss = bad if self._nonfinite_loss is None else self._nonfinite_loss | bad
        self.log_loss(loss, images)

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
                f"{found}, after step {self._checked_step} and no later than step {step}",
                f"The checkpoint before that is kept. Lower {self.rate} (now {getattr(self, self.rate):g}), warm up "
                f"longer, or clip harder (clip_grad_norm, now {self.clip_grad_norm:g}), and go on from it with "
                "--ckpt_path last. Single bad batches are passed over with nonfinite_steps.",
            )
        self._checked_step = step
