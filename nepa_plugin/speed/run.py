"""Time training steps: contenders side by side, in turns, and a table of what came out."""

import itertools
import logging
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pytorch_lightning import LightningDataModule, Trainer
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from nepa_plugin.data.digits import digit_images
from nepa_plugin.data.files import image_folder
from nepa_plugin.data.module import ImageData
from nepa_plugin.methods import Method
from nepa_plugin.methods.cost import training_cost
from nepa_plugin.models import MODEL_SIZES
from nepa_plugin.runtime.devices import check_compiler, resolve_devices
from nepa_plugin.runtime.provenance import provenance
from nepa_plugin.runtime.ranges import NonNegativeInt, PositiveInt, check_ranges
from nepa_plugin.speed.cases import PLAIN, Case
from nepa_plugin.speed.clock import PHASES, ClockCallback, LastMark, PeakMemory, StepClock, TimedLoss, median_phases
from nepa_plugin.speed.flops import matrix_peak, vit_training_flops


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        steps: Steps timed in a turn.
        warmup: Steps before them, which also compile.
        rounds: Turns of every case. They go round, so that a busy moment of the machine hits all alike.
        accelerator: ``"auto"``, ``"cuda"`` or ``"cpu"``.
        devices: Devices of this machine, with DDP where there are several.
        data: ``"random"``, one batch that stays on the device, or a folder of images.
        num_workers: Loader processes for the folder.
    """

    steps: PositiveInt = 20
    warmup: PositiveInt = 3
    rounds: PositiveInt = 3
    accelerator: str = "auto"
    devices: PositiveInt = 1
    data: str = "random"
    num_workers: NonNegativeInt | None = None

    def __post_init__(self) -> None:
        check_ranges(type(self), vars(self))


class RandomViews(LightningDataModule):
    """One batch of random views in the shapes of a method's own, handed out again and again.

    Args:
        method: The method that the views are for.
        batch_size: Images.
    """

    def __init__(self, method: Method, batch_size: int) -> None:
        super().__init__()
        views = method.train_transform()(digit_images(256)[0][0].convert("RGB"))
        generator = torch.Generator().manual_seed(0)
        self.batch: Any = (
            [torch.randn(batch_size, *view.shape, generator=generator) for view in views],
            torch.randint(1000, (batch_size,), generator=generator),
            [""] * batch_size,
            *([] if method.masks is None else [method.masks(batch_size)]),
        )
        self._moved = False

    def train_dataloader(self) -> DataLoader[Any]:
        """Return an endless loader of the batch."""
        return DataLoader(_Repeat(self), batch_size=None)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move the batch once."""
        if not self._moved:
            views, labels, names, *masks = self.batch
            masks = [[part.to(device) for part in drawn] for drawn in masks]
            self.batch, self._moved = ([v.to(device) for v in views], labels.to(device), names, *masks), True
        return self.batch


class _Repeat(IterableDataset[Any]):
    def __init__(self, source: RandomViews) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.source.batch


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what Lightning says of every trainer that is made."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"pytorch_lightning\b.*")
        warnings.filterwarnings("ignore", message=".*(LeafSpec|moving average|many workers|Checkpoint directory).*")
        try:
            yield
        finally:
            logger.setLevel(level)


def time_method(case: Case, options: Options) -> tuple[list[dict[str, float]], int | None]:
    """Time a method's steps as Lightning runs them, with its optimizer, clipping, online probe and moving average.

    Args:
        case: The method and its size.
        options: How to measure.

    Returns:
        Seconds per phase of each timed step, and the peak memory in bytes.
    """
    devices = resolve_devices(options.accelerator, options.devices)
    device = torch.device(devices.accelerator)
    torch.manual_seed(0)
    method = case.method()
    data: LightningDataModule
    if options.data == "random":
        data = RandomViews(method, case.batch_size)
    else:
        data = ImageData(
            train_dir=options.data,
            batch_size_per_device=case.batch_size,
            num_workers=options.num_workers,
            pipeline=case.pipeline,  # type: ignore[arg-type]
        )
    if case.compiled:
        method.compile_step()
    clock = StepClock(device)
    if isinstance(getattr(method, "criterion", None), torch.nn.Module):
        method.criterion = TimedLoss(method.criterion, clock)  # type: ignore[arg-type]
    last = LastMark(clock, options.warmup)
    trainer = Trainer(
        accelerator=devices.accelerator,
        devices=devices.devices,
        strategy="ddp" if devices.count > 1 else "auto",
        precision=case.precision,  # type: ignore[arg-type]
        max_steps=options.warmup + options.steps,
        callbacks=[ClockCallback(clock), last],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(method, data)
    steps = clock.steps()
    if len(steps) < options.steps:
        raise ValueError(f"Only {len(steps)} steps were timed: {options.data} has too few images for the batch.")
    return steps, last.memory.bytes() if last.memory else None


def time_plain(case: Case, options: Options) -> tuple[list[dict[str, float]], int | None]:
    """Time a contender that is no method in a bare loop: forward pass, loss, backward pass, AdamW.

    The loss of timm's own ``Eva`` is the mean square of its output; ``written-out`` returns NEPA's.

    Args:
        case: The size.
        options: How to measure; one device, random images.

    Returns:
        Seconds per phase of each timed step, and the peak memory in bytes.
    """
    device = torch.device(resolve_devices(options.accelerator, 1).accelerator)
    torch.manual_seed(0)
    model = case.plain().to(device).train()
    if case.compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda" or None)
    images = torch.randn(case.batch_size, 3, case.img_size, case.img_size, device=device)
    scaler = torch.amp.GradScaler(device.type, enabled=case.precision == "16-mixed")
    clock, memory = StepClock(device), None
    for step in range(options.warmup + options.steps):
        if step == options.warmup:
            clock.restart()
            memory = PeakMemory(device)
        clock.mark("start")
        with torch.autocast(device.type, case.dtype, enabled=case.precision != "32-true"):
            output: Tensor = model(images)
        clock.mark("loss_start")
        loss = output if output.ndim == 0 else output.float().square().mean()
        clock.mark("loss_end")
        optimizer.zero_grad()
        clock.mark("backward_start")
        scaler.scale(loss).backward()
        clock.mark("backward_end")
        scaler.step(optimizer)
        scaler.update()
        clock.mark("optimizer_end")
        clock.mark("end")
    return clock.steps(), memory.bytes() if memory else None


def benchmark(
    chosen: Sequence[Case], options: Options, report: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Time the cases in turns.

    Args:
        chosen: What to time.
        options: How.
        report: Called with a line after every turn.

    Returns:
        A mapping that JSON can hold: the options, the measured matrix peaks in FLOP/s, where it ran, and one entry per
        case: its fields, seconds per phase (medians over all timed steps), images per second over all devices (median,
        smallest and largest of the rounds), peak memory in bytes, FLOPs per image and utilisation of the matrix peak
        (per device).

    Raises:
        ValueError: If a case cannot be run with these options.
        DeviceError: If the devices are not there, or ``torch.compile`` does not work.
    """
    devices = resolve_devices(options.accelerator, options.devices)
    device = torch.device(devices.accelerator)
    if any(case.contender in PLAIN for case in chosen) and (devices.count > 1 or options.data != "random"):
        raise ValueError(
            f"{' and '.join(PLAIN)} are timed on one device and random images: leave out --devices and --data."
        )
    if options.data != "random":
        image_folder(options.data)  # before anything is measured
    if any(case.compiled for case in chosen):
        check_compiler(device.type)
    flops: dict[Case, float] = {}
    for case in chosen:
        flops[case] = flops_per_image(case)
        PeakMemory.release()
    peaks: dict[str, float] = {}
    turns: dict[Case, list[list[dict[str, float]]]] = {case: [] for case in chosen}
    memory: dict[Case, int | None] = {}
    for turn, case in itertools.product(range(options.rounds), chosen):
        # the peak is that of the same minutes, and the best of all rounds
        peaks[str(case.dtype)] = max(peaks.get(str(case.dtype), 0.0), matrix_peak(device, case.dtype, repeats=5))
        PeakMemory.release()
        with _quiet():
            steps, peak_memory = (time_plain if case.contender in PLAIN else time_method)(case, options)
        turns[case].append(steps)
        memory[case] = max((m for m in (memory.get(case), peak_memory) if m is not None), default=None)
        seconds = statistics.median(step["step"] for step in steps)
        report(f"round {turn + 1}/{options.rounds}  {case.label}: {case.batch_size / seconds:.4g} images/s per device")
    results = []
    for case in chosen:
        rounds = [case.batch_size * devices.count / statistics.median(s["step"] for s in turn) for turn in turns[case]]
        phases = median_phases(list(itertools.chain(*turns[case])))
        rate = statistics.median(rounds)
        results.append(
            {
                **asdict(case),
                "tokens": case.tokens,
                "seconds": phases,
                "images_per_second": {"median": rate, "smallest": min(rounds), "largest": max(rounds)},
                "peak_memory_bytes": memory[case],
                "flops_per_image": flops[case],
                "utilisation": flops[case] * rate / devices.count / peaks[str(case.dtype)],
            }
        )
    return {
        "options": asdict(options),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "devices": devices.count,
        "matrix_peak": peaks,
        "results": results,
        **provenance(),
    }


def flops_per_image(case: Case) -> float:
    """Return the FLOPs of a training step per image: counted in a method's step, by formula for the plain model."""
    if case.contender in PLAIN:
        embed_dim, depth, _ = MODEL_SIZES[case.model]
        return vit_training_flops(embed_dim, case.depth or depth, case.tokens - 1, 3 * case.patch_size**2)
    return training_cost(case.method(), batch_size=2).gflops * 1e9


def table(results: dict[str, Any]) -> Table:
    """Return the results of :func:`benchmark` for the terminal.

    Args:
        results: What it returned.

    Returns:
        A table with one row per case; ratios are to the first row.
    """
    peaks = ", ".join(
        f"{name.removeprefix('torch.')} {peak / 1e12:.3g}" for name, peak in results["matrix_peak"].items()
    )
    grid = Table(
        title=f"{results['devices']} x {results['device']}; matrix peak in TFLOP/s: {peaks}", title_justify="left"
    )
    columns = ("case", "images/s (rounds)", "ratio", "ms/step", *PHASES, "peak GB", "GFLOP/image", "of peak")
    for column in columns:
        grid.add_column(column, justify="left" if column == "case" else "right")
    first = results["results"][0]["images_per_second"]["median"]
    fields = Case.__dataclass_fields__
    for row in results["results"]:
        rate, seconds, peak = row["images_per_second"], row["seconds"], row["peak_memory_bytes"]
        grid.add_row(
            Case(**{name: row[name] for name in fields}).label,
            f"{rate['median']:.4g} ({rate['smallest']:.4g}-{rate['largest']:.4g})",
            f"{rate['median'] / first:.2f}",
            f"{seconds['step'] * 1e3:.4g}",
            *(f"{100 * seconds[name] / seconds['step']:.1f}%" for name in PHASES),
            "-" if peak is None else f"{peak / 1e9:.2f}",
            f"{row['flops_per_image'] / 1e9:.4g}",
            f"{100 * row['utilisation']:.1f}%",
        )
    return grid
