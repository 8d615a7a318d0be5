"""What a training module logs without waiting for the device: loss and speed."""

import time
from typing import Any

from pytorch_lightning import LightningModule
from torch import Tensor


class LoggedModule(LightningModule):
    """Logs the loss of a step and of an epoch, and images per second.

    Attributes:
        batch_size_per_device: Images per device and forward pass.
    """

    batch_size_per_device: int
    #: When the last logged step was, and which.
    _clock: tuple[float, int] | None = None

    @property
    def global_batch_size(self) -> int:
        """Images per optimizer step: per device x devices x accumulated batches."""
        return self.batch_size_per_device * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def log_loss(self, loss: Tensor, images: int) -> None:
        """Log the loss of a batch of so many images."""
        self.log("train_loss", self.mean_over_devices(loss))  # prog_bar would wait for the device in every step
        self.log(
            "epoch_loss", loss.detach(), on_step=False, on_epoch=True, sync_dist=True, batch_size=images, logger=False
        )

    def mean_over_devices(self, value: Tensor) -> Tensor:
        """Return the mean over devices where it is written, and this device's value between.

        ``self.log(sync_dist=True)`` would wait for all devices, with a barrier, in every step and for every value.
        """
        if self._trainer is None or self.trainer.world_size == 1 or not self.is_logging_step:
            return value.detach()
        return self.trainer.strategy.reduce(value.detach().clone(), reduce_op="mean")  # type: ignore[return-value]

    @property
    def is_logging_step(self) -> bool:
        """Whether this step's values are written; anything costly to compute is computed only then."""
        return self._trainer is not None and (self.trainer.global_step + 1) % self._log_every == 0

    @property
    def _log_every(self) -> int:
        return int(getattr(self.trainer, "log_every_n_steps", 50))

    def on_train_start(self) -> None:
        """Start the clock of ``images_per_second``."""
        self._clock = None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log images per second since the last logged step, over all devices."""
        trainer = self.trainer
        if trainer.global_step == 0 or trainer.global_step % self._log_every:
            return
        now = time.perf_counter()
        if self._clock is not None and trainer.global_step > self._clock[1]:
            images = (trainer.global_step - self._clock[1]) * self.global_batch_size
            self.log("images_per_second", images / (now - self._clock[0]))
        if self._clock is None or trainer.global_step > self._clock[1]:
            self._clock = now, trainer.global_step

    def on_validation_end(self) -> None:
        """Leave the time of a validation out of ``images_per_second``."""
        self._clock = None
