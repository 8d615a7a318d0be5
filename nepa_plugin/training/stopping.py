"""SIGTERM: all processes stop after the same optimizer step, and a validation that has begun is finished first."""

import os
import select
import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor


class Deadline(threading.Thread):
    """Ends a process that has got SIGTERM and waits in vain for another one.

    A process in a collective whose other side is gone waits in C++, where Python's signal handlers never run. The
    number of a signal is written to a pipe all the same, which this thread reads.

    Args:
        seconds: Without a batch's beginning after the signal, or five times the longest such time before it if that is
            more; then the process ends.
    """

    #: A second signal ends the process, but not one within this many seconds, which is the first, passed on twice.
    SECOND = 5.0

    def __init__(self, seconds: float) -> None:
        super().__init__(name="deadline", daemon=True)
        self.seconds = seconds
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._last, self._longest = time.monotonic(), 0.0
        self._signalled: float | None = None

    def beat(self) -> None:
        """Note that a batch begins."""
        now = time.monotonic()
        self._longest, self._last = max(self._longest, now - self._last), now

    def close(self) -> None:
        """End the thread: the process has answered, or its training is over."""
        if self._writer >= 0:
            signal.set_wakeup_fd(self._before)
            os.close(self._writer)
            self._writer = -1

    def run(self) -> None:
        """Read signals until closed."""
        while True:
            if select.select([self._reader], [], [], 0.5)[0]:
                numbers = os.read(self._reader, 64)
                if not numbers:
                    os.close(self._reader)
                    return
                if signal.SIGTERM in numbers:
                    now = time.monotonic()
                    if self._signalled is None:
                        self._signalled = now
                    elif now - self._signalled > self.SECOND:
                        self.end("got SIGTERM a second time")
            if self._signalled is not None:
                waited = time.monotonic() - max(self._signalled, self._last)
                if waited > max(self.seconds, 5 * self._longest):
                    self.end(f"got SIGTERM and waits for another process since {waited:.0f} s")

    @property
    def signalled(self) -> bool:
        """Whether the process has got SIGTERM."""
        return self._signalled is not None

    @staticmethod
    def end(why: str) -> None:
        """End this process at once, with status 143 and a line that says why."""
        text = f"A process {why}: it ends without a checkpoint of its own. Go on from the last one: --ckpt_path last.\n"
        os.write(2, text.encode())
        os._exit(143)


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because the other side is gone; gloo has no error of its own for it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "onnection " in str(error))


class StopTogether(Callback):
    """Stop every process after the same optimizer step once one of them has got SIGTERM.

    Takes the place of what Lightning 2.6 does in a run of several processes: a broadcast before every batch that waits
    for the device, and another in the signal's handler, which can meet a gradient's all-reduce on the other side. Here
    each process tells the others over the CPU, in a byte per batch, whether it was signalled; the answer is read a
    batch later, when it has long been there.

    A process that cannot be answered, since another one has died or hangs, ends by itself: see :class:`Deadline`.

    With one process Lightning's own handling stays, except in a validation: Lightning would break it off, with the
    averaged weights in the model's place, and never do it again.
    """

    #: Least time without progress after the signal; torchrun and SLURM wait 30 seconds before they send SIGKILL.
    SECONDS = 20.0

    def __init__(self) -> None:
        self._deadline: Deadline | None = None
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
            self._deadline = Deadline(self.SECONDS)
            self._deadline.start()
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: self.agree(trainer)  # type: ignore[method-assign]

    def note(self, trainer: Trainer, signum: int) -> None:
        """Remember the signal, and pass it on to the processes that this one has started."""
        launcher = trainer.strategy.launcher
        if not self._signalled and launcher is not None:
            launcher.kill(signum)  # type: ignore[arg-type]
        self._signalled = True
        self._stop_alone(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the progress."""
        if self._deadline is not None:
            self._deadline.beat()

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Note the progress."""
        if self._deadline is not None:
            self._deadline.beat()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the signals to others."""
        if self._deadline is not None:
            self._deadline.close()
            self._deadline = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End as :class:`Deadline` would, where the process that this one waits for has ended first on the same signal.

        Both deadlines pass at about the same time; the collective of the later one then fails.
        """
        noted = self._signalled or (self._deadline is not None and self._deadline.signalled)
        if noted and trainer.world_size > 1 and _is_lost_connection(exception):
            Deadline.end("got SIGTERM, and the one that it waits for has ended")

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
            if self._deadline is not None:
                self._deadline.close()  # the checkpoint may take as long as it takes
            raise SIGTERMException
        flag = torch.tensor(self._signalled or self._agreed, dtype=torch.uint8)
        self._sent = dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, async_op=True), flag
