"""Marks in a training step, in device time on CUDA, and what lies between them."""

import contextlib
import ctypes
import gc
import re
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback, Checkpoint
from torch import Tensor, nn

PHASES = ("data", "forward", "loss", "backward", "optimizer", "ema")
#: The phase that ends with a mark.
ENDS = {
    "start": "data",
    "loss_start": "forward",
    "loss_end": "loss",
    "backward_start": "forward",
    "backward_end": "backward",
    "optimizer_end": "optimizer",
    "end": "ema",
}


class StepClock:
    """Takes the time at named marks; on CUDA by events in the stream, which the host does not wait for.

    Args:
        device: Where the step runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """Take the time at the end of the phase that ``name`` ends."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def restart(self) -> None:
        """Forget the warm-up: the measured steps begin here."""
        self.marks.clear()
        self.mark("end")

    def steps(self) -> list[dict[str, float]]:
        """Return seconds per phase, and their sum as ``"step"``, of each step since :meth:`restart`.

        Waits for the device. A phase that occurs several times in a step (a loss of several terms) is added up.
        """
        if self.cuda:
            torch.cuda.synchronize()
        found: list[dict[str, float]] = []
        phases = dict.fromkeys((*PHASES, "step"), 0.0)
        for (_, before), (name, now) in pairwise(self.marks):
            seconds = before.elapsed_time(now) / 1e3 if self.cuda else now - before
            phases[ENDS[name]] += seconds
            phases["step"] += seconds
            if name == "end":
                found.append(phases)
                phases = dict.fromkeys((*PHASES, "step"), 0.0)
        return found


class TimedLoss(nn.Module):
    """A loss with a mark before and after it."""

    def __init__(self, loss: nn.Module, clock: StepClock) -> None:
        super().__init__()
        self.loss, self._clock = loss, [clock]  # in a list: a copy of the method must not take events along

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss."""
        self._clock[0].mark("loss_start")
        value = self.loss(*args, **kwargs)
        self._clock[0].mark("loss_end")
        return value


class ClockCallback(Callback):
    """Marks the steps of a Lightning run. Goes first among the callbacks; :class:`LastMark` comes last.

    Args:
        clock: Where the marks go.
    """

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """End of the wait for data."""
        self.clock.mark("start")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """End of the forward pass."""
        self.clock.mark("backward_start")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End of the backward pass."""
        self.clock.mark("backward_end")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End of clipping, optimizer and schedule; other callbacks, the moving average among them, follow."""
        self.clock.mark("optimizer_end")


class LastMark(Checkpoint):
    """Ends the step after all other callbacks: Lightning runs a ``Checkpoint`` last.

    Args:
        clock: Where the marks go.
        warmup: Steps before the measurement.
    """

    def __init__(self, clock: StepClock, warmup: int) -> None:
        self.clock = clock
        self.warmup = warmup
        self.memory: PeakMemory | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End of the step; after the last one of the warm-up the measurement begins."""
        if trainer.global_step == self.warmup:
            self.clock.restart()
            self.memory = PeakMemory(pl_module.device)
        else:
            self.clock.mark("end")


class PeakMemory:
    """The largest memory in use since this was made: of the allocator on CUDA, of the whole process on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.resettable = self.cuda or self._reset()

    def _reset(self) -> bool:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: restart the high-water mark of this process
        except OSError:
            return False
        return True

    @staticmethod
    def release() -> None:
        """Give memory that is free back to the system, so that a later peak is not that of an earlier case."""
        gc.collect()  # modules and their trainers refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        with contextlib.suppress(OSError, AttributeError):  # glibc keeps it for the process otherwise
            ctypes.CDLL("libc.so.6").malloc_trim(0)

    def bytes(self) -> int | None:
        """Return the peak in bytes, or nothing where the system does not tell."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        if not self.resettable:
            return None
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(peak.group(1)) * 1024 if peak else None


def median_phases(steps: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each phase, and of the step, in seconds."""
    return {name: statistics.median(step[name] for step in steps) for name in (*PHASES, "step")}
