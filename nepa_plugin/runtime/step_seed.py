"""The random numbers of a training step, as a function of its place in the run: what makes a resume exact."""

from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback

from nepa_plugin.rope import ResidentRope


def trained_batches(trainer: Any) -> int:
    """Return how many batches a run has been trained on, over all epochs and restarts."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)


class StepSeed(Callback):
    """Make the random numbers of every training batch a function of the seed, the batch's number and the process.

    Masks, mixtures, dropout and stochastic depth are then the same in a resumed run as in one that was never stopped,
    and no two processes draw the same for their images. RoPE's rescaling, one factor for all images of a step, is the
    same in every process.

    Args:
        seed: Seed of the run.
    """

    #: Between the seeds of two processes: odd and large, since the CPU's generator reads no more than 32 bits of them.
    STRIDE = 2_654_435_761

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the generators."""
        batches, rank = self.place(trainer)
        seed = self.seed * 1_000_003 + batches
        own = seed + self.STRIDE * rank
        torch.manual_seed(own % 2**63)
        np.random.seed(own % 2**32)  # timm's mixup draws from it
        for module in pl_module.modules():
            if isinstance(module, ResidentRope):
                module.seed_factors(seed % 2**63)

    @staticmethod
    def place(trainer: Trainer) -> tuple[int, int]:
        """Return the batch's number in the run, and the process."""
        return trained_batches(trainer), trainer.global_rank
