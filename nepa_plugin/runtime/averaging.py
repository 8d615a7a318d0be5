"""The moving average of the weights: Lightning's callback without its waits for the device, also of sharded weights."""

import sys
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from nepa_plugin.runtime.sharding import ShardedStrategy, full_tensors, local_tensor, shards_like

#: The published decay, in pretraining and fine-tuning (arXiv 2512.16922).
PUBLISHED_DECAY = 0.9999
#: Spans of the average, 1 / (1 - d) steps, that a run must have: exp(-5) of its first weights is left at the end then.
SPANS = 5
#: Beyond this fraction of first weights in it, an average says little of what the run has learned.
MOST_FIRST_WEIGHTS = 0.05


def decay_for(steps: int) -> float:
    """Return the published decay, or in a run too short for it the largest whose average forgets the first weights.

    Args:
        steps: Optimizer steps of the run.

    Returns:
        The decay.
    """
    return max(0.0, min(PUBLISHED_DECAY, 1 - SPANS / steps))


def first_weights(decay: float, steps: int) -> float:
    """Return which part of a moving average is the first weights still, after so many steps of a run.

    Args:
        decay: d of the average; 0 for none.
        steps: Optimizer steps; the first one's weights are what the average starts with.

    Returns:
        A fraction; 0 without an average.
    """
    return decay ** max(0, steps - 1) if decay else 0.0


def decay_of(trainer: Trainer) -> float:
    """Return the decay of a trainer's moving average that is in force, 0 without one."""
    averages = [c for c in trainer.callbacks if isinstance(c, FusedEMA)]  # type: ignore[attr-defined]
    return averages[0].decay if averages else 0.0


class ModelAverage:
    """Moving averages of a module's parameters and buffers; a sharded parameter's average is the same shard of it.

    Stands in for ``torch.optim.swa_utils.AveragedModel`` in Lightning's callback, with the same state. Differences: one
    fused operation for all floating-point tensors, and the number of updates is on the host, so that an update never
    waits for the device. As there, the first update copies, and integer buffers are rounded towards zero.

    Args:
        module: What is averaged; its values are the first averages.
        decay: d in ``average = d * average + (1 - d) * value``.
        device: Where the averages are; where the values are by default.
    """

    def __init__(self, module: nn.Module, decay: float, device: torch.device | None = None) -> None:
        self.decay = decay
        self.num_averaged = 0
        self.averages = [t.detach().to(device or t.device, copy=True) for t in _tensors(module)]

    def _pairs(self, module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (average, value), of a sharded parameter this rank's part."""
        for average, value in zip(self.averages, _tensors(module), strict=True):
            yield local_tensor(average), local_tensor(value.detach())

    @torch.no_grad()
    def update_parameters(self, module: nn.Module) -> None:
        """Move the averages towards the values of ``module``."""
        pairs = list(self._pairs(module))
        if self.num_averaged == 0:
            torch._foreach_copy_([average for average, _ in pairs], [value for _, value in pairs])
        else:
            floats = [pair for pair in pairs if pair[0].is_floating_point()]
            torch._foreach_lerp_([average for average, _ in floats], [value for _, value in floats], 1 - self.decay)
            for average, value in pairs:
                if not average.is_floating_point():
                    average.copy_(average * self.decay + value * (1 - self.decay))
        self.num_averaged += 1

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the averages and the values of ``module``."""
        for average, value in self._pairs(module):
            kept = average.clone()
            average.copy_(value)
            value.copy_(kept)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Set the values of ``module`` to the averages."""
        for average, value in self._pairs(module):
            value.copy_(average)

    def _named(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the averages under the names of ``module``'s state."""
        averages = {id(value): average for average, value in zip(self.averages, _tensors(module), strict=True)}
        return {name: averages[id(value)] for name, value in module.state_dict(keep_vars=True).items()}

    def state_of(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the averages as ``module``'s state; sharded ones are gathered, on rank zero only."""
        return full_tensors(self._named(module))

    @torch.no_grad()
    def load_state_of(self, module: nn.Module, state: dict[str, Tensor]) -> None:
        """Set the averages from a state of ``module``, each rank its shards.

        Args:
            module: What is averaged.
            state: Its state with the averages as values.

        Raises:
            KeyError: If a tensor is missing.
        """
        own = self._named(module)
        for name, value in shards_like({name: state[name] for name in own}, own).items():
            own[name].copy_(value)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


class FusedEMA(EMAWeightAveraging):
    """Lightning's moving average of the weights, with :class:`ModelAverage` as the average.

    When it updates, what validation sees and what a checkpoint holds (averages under ``state_dict``, current weights
    under ``current_model_state``, ``n_averaged`` under ``averaging_state``) are Lightning's.

    Args:
        decay: Decay of the average per optimizer step; ``None`` is :func:`decay_for` the run's steps.

    Attributes:
        decay: The one in force.
    """

    _average_model: ModelAverage | None  # type: ignore[assignment]

    def __init__(self, decay: float | None) -> None:
        self.asked = decay
        self.decay: float = PUBLISHED_DECAY if decay is None else decay
        super().__init__(decay=self.decay)

    @property
    def state_key(self) -> str:
        """Where a checkpoint keeps this callback's state: as Lightning's, whose checkpoints can be gone on from."""
        return "EMAWeightAveraging"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the averages at the weights; of a sharded model, :meth:`on_fit_start` does."""
        if stage == "fit" and not isinstance(trainer.strategy, ShardedStrategy):
            self._average_model = ModelAverage(pl_module, self.decay, pl_module.device)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the averages of a model that only now is sharded."""
        if self._average_model is None:
            self._average_model = ModelAverage(pl_module, self.decay)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit the decay to the run, or say that the one that was asked for does not."""
        super().on_train_start(trainer, pl_module)
        steps = trainer.estimated_stepping_batches
        if self.asked is None:
            self.decay = decay_for(int(steps)) if steps < float("inf") else PUBLISHED_DECAY
            if self.decay < PUBLISHED_DECAY:
                rank_zero_info(
                    f"Moving average: decay {self.decay:.4g}. The published {PUBLISHED_DECAY} spans "
                    f"{1 / (1 - PUBLISHED_DECAY):.0f} steps, this run has {steps}."
                )
        elif (left := first_weights(self.decay, int(min(steps, sys.maxsize)))) > MOST_FIRST_WEIGHTS:
            rank_zero_warn(
                f"The moving average with decay {self.decay} spans {1 / (1 - self.decay):.0f} steps, this run has "
                f"{steps}: {left:.0%} of the exported weights will be the first ones. Lower ema_decay, or leave it out "
                "and it fits the run."
            )
        assert self._average_model is not None
        self._average_model.decay = self.decay

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the averages under ``state_dict`` and the current weights beside them."""
        if self._average_model is None:
            return
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        checkpoint["state_dict"] = self._average_model.state_of(pl_module)
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self._average_model.num_averaged)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore both; weights that were saved without averages are the first averages too."""
        if self._average_model is None:
            return
        self._average_model.load_state_of(pl_module, checkpoint["state_dict"])
        if "averaging_state" not in checkpoint:
            rank_zero_warn("The checkpoint holds no moving average: it starts at the checkpoint's weights.")
            return
        self._average_model.num_averaged = int(checkpoint["averaging_state"]["n_averaged"])
        own = pl_module.state_dict(keep_vars=True)
        pl_module.load_state_dict(shards_like(checkpoint["current_model_state"], own))

    def _swap_models(self, pl_module: LightningModule) -> None:
        assert self._average_model is not None
        self._average_model.swap(pl_module)

    def _copy_average_to_current(self, pl_module: LightningModule) -> None:
        assert self._average_model is not None
        self._average_model.copy_to(pl_module)
