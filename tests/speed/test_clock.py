import mmap
import time

import pytest
import torch

from nepa_plugin.speed.clock import PeakMemory, StepClock, median_phases

CPU = torch.device("cpu")


def test_phases(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 3.5, 7.0, 8.0, 10.0, 10.25, 11.0, 12.0, 15.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = StepClock(CPU)
    clock.mark("start")  # of the warm-up, at 0
    clock.restart()  # at 1
    for name in ("start", "loss_start", "loss_end", "backward_start", "backward_end", "optimizer_end", "end"):
        clock.mark(name)
    clock.mark("start")
    clock.mark("backward_start")
    steps = clock.steps()
    assert len(steps) == 1  # the second has not ended
    assert steps[0] == {
        "data": 2.0,
        "forward": 0.5 + 1.0,  # before the loss, and what follows it
        "loss": 3.5,
        "backward": 2.0,
        "optimizer": 0.25,
        "ema": 0.75,
        "step": 10.0,
    }


def test_median():
    clock = [
        {"data": d, "step": 2 * d} | dict.fromkeys(("forward", "loss", "backward", "optimizer", "ema"), 0.0)
        for d in (1, 9, 2)
    ]
    assert median_phases(clock)["data"] == 2 and median_phases(clock)["step"] == 4


def test_peak_memory_sees_what_was_freed():
    peak = PeakMemory(CPU)
    before = peak.bytes()
    if before is None:
        pytest.skip("this system does not reset its high-water mark")
    # Pages of the system's own: the allocator may serve a tensor from memory that earlier tests left resident.
    with mmap.mmap(-1, 200_000_000) as pages:
        torch.frombuffer(pages, dtype=torch.uint8).fill_(1)
    seen = peak.bytes()
    assert 0.9 * 200e6 < seen - before < 1.2 * 200e6
    assert PeakMemory(CPU).bytes() < seen and PeakMemory(CPU).bytes() - before < 100e6
