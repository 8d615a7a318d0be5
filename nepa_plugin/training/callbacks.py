"""What a run needs around Lightning: the last checkpoint, its clock, a line per epoch."""

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, RichModelSummary, RichProgressBar
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.exceptions import SIGTERMException
from pytorch_lightning.utilities.model_summary import get_human_readable_count
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from rich import get_console
from rich.table import Table

from nepa_plugin.checkpoints import write_tensors
from nepa_plugin.methods.optimization import OptimizedModule


class LoggedBar(RichProgressBar):
    """Lightning's bar with loss and speed as they were last logged.

    Lightning converts what is logged for the bar to a number in every batch, and each time the host waits until the
    device has computed it. What is logged is converted anyway, once in ``log_every_n_steps``.
    """

    NAMES = "train_loss", "images_per_second"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._shown: dict[str, tuple[Any, float]] = {}

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return what the bar shows: Lightning's own, and the logged values, each converted once."""
        for name in self.NAMES:
            value = trainer.logged_metrics.get(name)
            if value is not None and (name not in self._shown or self._shown[name][0] is not value):
                self._shown[name] = value, float(value)
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)  # type: ignore[assignment]
        return metrics | {name: shown for name, (_, shown) in self._shown.items()}


class Parameters(RichModelSummary):
    """Lightning's table of a model's parts, without operations.

    Lightning counts them where a model has an example input, and prints 0 where it has none. What a step of pretraining
    takes is counted for ``summary.json``.
    """

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        """Print the parts and the sum of their parameters."""
        columns = [(name.strip(), cells) for name, cells in summary_data if name != "FLOPs"]
        table = Table()
        for name, _ in columns:
            table.add_column(name, justify="right" if name.startswith("Params") else "left")
        for row in zip(*(cells for _, cells in columns), strict=True):
            table.add_row(*row)
        counts = total_parameters, trainable_parameters
        total, trained = (get_human_readable_count(int(count)).strip() for count in counts)
        get_console().print(table, f"{total} parameters, {trained} of them trained", highlight=False)


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes with :func:`~nepa_plugin.checkpoints.write_tensors`, and keeps the checkpoint before as previous.ckpt."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the file at once or not at all."""
        write_tensors(checkpoint, path, previous=Path(path).with_name("previous.ckpt"))


class LastCheckpoint(ModelCheckpoint):
    """Keep ``last.ckpt``, and the one before it: every n optimizer steps, at the end of each epoch, and on SIGTERM.

    Only ever written between two optimizer steps, so that resuming from it is exact, and only with finite weights.

    Args:
        folder: Where ``last.ckpt`` goes.
        every_n_steps: Optimizer steps between two checkpoints.
    """

    def __init__(self, folder: str | Path, every_n_steps: int) -> None:
        super().__init__(
            dirpath=str(folder),
            filename="last",
            save_top_k=1,
            every_n_train_steps=every_n_steps,
            enable_version_counter=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the writer in place."""
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # a plugin that was asked for stays
            trainer.strategy.checkpoint_io = WholeCheckpointIO()

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if isinstance(method := trainer.lightning_module, OptimizedModule):
            method.check_finite(weights=True)
        super()._save_checkpoint(trainer, filepath)

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step and self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every n steps; what an epoch ends with is saved after its validation, which would else be lost."""
        if not trainer.is_last_batch and batch_idx + 1 < trainer.num_training_batches:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what the epoch ended with."""
        self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: the end of the last epoch is saved, and by now the averaged weights have been put in place."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save on SIGTERM, which Lightning raises between batches, unless gradients are being accumulated."""
        if isinstance(exception, SIGTERMException) and not trainer.fit_loop._should_accumulate():
            self._save(trainer)
            rank_zero_info(f"Stopped by SIGTERM after step {trainer.global_step}; go on with --ckpt_path last.")


class RunClock(Callback):
    """Measure a run over all its restarts: seconds of training without validation, images seen, peak memory."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.images = 0
        self.peak_bytes = 0
        self._started: float | None = None

    def _stop(self) -> None:
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
            self._started = None

    def _measure(self, trainer: Trainer) -> None:
        if torch.cuda.is_available() and trainer.strategy.root_device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.peak_bytes = max(self.peak_bytes, int(peak))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images of the batch, over all devices."""
        self.images += len(batch[1]) * trainer.world_size

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start it again."""
        if not trainer.sanity_checking:
            self._started = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock for good."""
        self._stop()
        self._measure(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the totals so far, for the checkpoint."""
        running = time.perf_counter() - self._started if self._started is not None else 0.0
        return {"seconds": self.seconds + running, "images": self.images, "peak_bytes": self.peak_bytes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's totals."""
        self.seconds, self.images = state_dict["seconds"], state_dict["images"]
        self.peak_bytes = state_dict["peak_bytes"]


class EpochLines(Callback):
    """Print a line per epoch, where the output is no terminal and a progress bar would fill the log.

    Every number is the epoch's own: the mean loss over its steps and all devices, the images per second of its
    training, and the accuracy (a fraction; in pretraining the online probe's) only if it was validated. After a resume
    within an epoch they are those of the rest of it.

    Args:
        clock: Measures the run.
    """

    def __init__(self, clock: RunClock) -> None:
        self.clock = clock
        self._start = clock.state_dict()
        self._validated = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember where the run is."""
        self._start, self._validated = self.clock.state_dict(), False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the epoch has a validation, unless it is Lightning's check before training."""
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch, its steps so far, loss, accuracy and speed."""
        metrics = trainer.callback_metrics  # every rank must ask: the first to do so waits for the others
        if not trainer.is_global_zero:
            return
        values = [f"loss {float(metrics['epoch_loss']):.4g}"]
        for word, name in (("online probe top-1", "val_online_cls_top1"), ("val top-1", "val_top1")):
            if self._validated and name in metrics:
                values.append(f"{word} {float(metrics[name]):.4g}")
        now = self.clock.state_dict()
        seconds = now["seconds"] - self._start["seconds"]
        if seconds > 0:
            values.append(f"images/s {(now['images'] - self._start['images']) / seconds:.4g}")
        epochs = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
        print(f"epoch {trainer.current_epoch + 1}{epochs}  step {trainer.global_step}  {'  '.join(values)}", flush=True)
