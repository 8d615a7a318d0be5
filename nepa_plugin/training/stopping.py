"""SIGTERM: all processes stop after the same optimizer step, and a validation that has begun is finished first."""

from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor


class StopTogether(Callback):
    """Stop every process after the same optimizer step once one of them has got SIGTERM.

    Takes the place of what Lightning 2.6 does in a run of several processes: a broadcast before every batch that waits
    for the device, and another in the signal's handler, which can meet a gradient's all-reduce on the other side. Here
    each process tells the others over the CPU, in a byte per batch, whether it was signalled; the answer is read a
    batch later, when it has long been there.

    With one process Lightning's own handling stays, except in a validation: Lightning would break it off, with the
    averaged weights in the model's place, and never do it again.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._agreed = False
        self._sent: tuple[Any, Tensor] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put :meth:`agree` and :meth:`note` where Lightning has its own."""
        if stage != "fit":
            return
        trainer._signal_connector._sigterm_notifier_fn = lambda signum, _: self.note(trainer, signum)  # type: ignore[method-assign]
        if trainer.world_size > 1:
            self._group: Any = dist.new_group(backend="gloo")
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: self.agree(trainer)  # type: ignore[method-assign]

    def note(self, trainer: Trainer, signum: int) -> None:
        """Remember the signal, and pass it on to the processes that this one has started."""
        launcher = trainer.strategy.launcher
        if not self._signalled and launcher is not None:
            launcher.kill(signum)  # type: ignore[arg-type]
        self._signalled = True
        self._stop_alone(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the last answer, so that no process has left while another is still owed its part."""
        if self._sent is not None:
            self._sent[0].wait()
            self._sent = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after the epoch if the signal has come meanwhile."""
        if not trainer.sanity_checking:
            self._stop_alone(trainer, validating=False)

    def _stop_alone(self, trainer: Trainer, validating: bool | None = None) -> None:
        validating = trainer.validating if validating is None else validating
        if self._signalled and trainer.world_size == 1 and not validating:
            trainer._signal_connector.received_sigterm = True

    def agree(self, trainer: Trainer) -> None:
        """Stop if any process was signalled before the last batch; called before each batch.

        Raises:
            SIGTERMException: On every process at the same batch, and only between two optimizer steps.
        """
        if self._sent is not None:
            work, flag = self._sent
            work.wait()
            self._agreed = bool(flag)
        if self._agreed and not trainer.fit_loop._should_accumulate():
            trainer._signal_connector.received_sigterm = True
            raise SIGTERMException
        flag = torch.tensor(self._signalled or self._agreed, dtype=torch.uint8)
        self._sent = dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, async_op=True), flag
