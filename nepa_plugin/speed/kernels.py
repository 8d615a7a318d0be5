"""Which operators, and on CUDA which kernels, a training step spends its time in."""

from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from nepa_plugin.runtime.devices import resolve_devices
from nepa_plugin.speed.cases import PLAIN, Case
from nepa_plugin.speed.run import Options, RandomViews


@dataclass(frozen=True)
class Kernel:
    """An operator or kernel of a step.

    Attributes:
        name: PyTorch's or the kernel's name.
        calls: Times it ran in a step.
        share: Its own time over that of all.
    """

    name: str
    calls: float
    share: float


def profile_step(case: Case, options: Options, steps: int = 3) -> list[Kernel]:
    """Profile forward and backward pass of a method's step, without Lightning and the optimizer.

    Args:
        case: The method and its size.
        options: Where it runs; random images on one device.
        steps: Steps that are profiled, after the warm-up.

    Returns:
        CUDA's kernels, or the CPU's operators where there is no CUDA, the longest first.

    Raises:
        ValueError: For the plain model, which is no method.
    """
    if case.contender in PLAIN:
        raise ValueError(f"Only a method's step is profiled, not that of {case.contender}.")
    device = torch.device(resolve_devices(options.accelerator, 1).accelerator)
    torch.manual_seed(0)
    method = case.method().to(device).train()
    if case.compiled:
        method.compile_step()
    batch = RandomViews(method, case.batch_size).transfer_batch_to_device(None, device, 0)

    def step() -> None:
        with torch.autocast(device.type, case.dtype, enabled=case.precision != "32-true"):
            loss = method.step(batch[0], *batch[3:])[0]
        loss.backward()
        method.zero_grad()

    for _ in range(options.warmup):
        step()
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            step()
        if cuda:
            torch.cuda.synchronize()
    times: list[tuple[str, int, float]] = [
        (event.key, event.count, float(event.self_device_time_total if cuda else event.self_cpu_time_total))
        for event in recorded.key_averages()
    ]
    total = sum(time for _, _, time in times) or 1.0
    found = [Kernel(name, count / steps, time / total) for name, count, time in times if time]
    return sorted(found, key=lambda kernel: -kernel.share)


def kernel_table(kernels: list[Kernel], title: str, rows: int = 15) -> Table:
    """Return the longest kernels for the terminal."""
    table = Table(title=title, title_justify="left")
    columns: dict[str, Any] = {"kernel": "left", "calls per step": "right", "share of time": "right"}
    for column, justify in columns.items():
        table.add_column(column, justify=justify)
    for kernel in kernels[:rows]:
        table.add_row(kernel.name[:110], f"{kernel.calls:g}", f"{100 * kernel.share:.1f}%")
    return table
