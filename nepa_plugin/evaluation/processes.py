"""The machine that an evaluation runs on: devices, processes, and trainers."""

import logging
import os
import random
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.utilities.seed import isolate_rng

from nepa_plugin.evaluation.features import Precision, resolve_precision
from nepa_plugin.runtime.devices import DeviceError, Devices, check_launch, resolve_devices
from nepa_plugin.runtime.provenance import provenance


@dataclass(frozen=True)
class Runtime:
    """Devices and processes of an evaluation.

    Attributes:
        accelerator: ``"cuda"`` or ``"cpu"``.
        devices: As Lightning takes them.
        device: This process's.
        rank: This process.
        world_size: Number of processes.
        progress: Whether to show progress bars.
        asked_precision: What is to be computed with.
    """

    accelerator: str
    devices: Any
    device: torch.device
    rank: int = 0
    world_size: int = 1
    progress: bool = False
    asked_precision: Precision = "auto"

    @property
    def precision(self) -> Precision:
        """What is computed with: ``bf16-mixed`` or ``32-true``."""
        return resolve_precision(self.asked_precision, self.accelerator)

    def trainer(self, epochs: int, callbacks: list[Callback] | None = None, **kwargs: Any) -> Trainer:
        """Return a trainer that validates after the last epoch and writes nothing."""
        callbacks = list(callbacks or [])
        if self.progress:
            callbacks.append(RichProgressBar(leave=False))
        arguments: dict[str, Any] = {
            "accelerator": self.accelerator,
            "devices": self.devices,
            "strategy": "ddp" if self.world_size > 1 else "auto",
            "precision": self.precision,
            "max_epochs": epochs,
            "check_val_every_n_epoch": epochs,
            "num_sanity_val_steps": 0,
            "sync_batchnorm": self.accelerator == "cuda" and self.world_size > 1,  # there is none for the CPU
            "use_distributed_sampler": False,  # the loaders are split already, every validation image once
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": self.progress,
            "callbacks": callbacks,
            "default_root_dir": tempfile.gettempdir(),
        }
        return Trainer(**(arguments | kwargs))

    def from_zero(self, value: Any) -> Any:
        """Return process zero's value in every process."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]


def launch(
    accelerator: str = "auto", devices: Any = 1, progress: bool = False, precision: Precision = "auto"
) -> Runtime:
    """Start one process per device, and say which one this is.

    With more than one device, Lightning's Fabric starts the other processes by running this process's command again;
    under ``torchrun`` they exist already, and ``devices`` follows from it.

    Args:
        accelerator: ``"auto"``, ``"cuda"`` or ``"cpu"``.
        devices: A number, a list of GPU indices, or ``"auto"``.
        progress: Whether process zero shows progress bars.
        precision: What is computed with.

    Returns:
        The runtime of this process.

    Raises:
        DeviceError: If the machine does not have what was asked for.
    """
    resolved = find_devices(accelerator, devices)
    if resolved.count == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        index = resolved.devices[0] if isinstance(resolved.devices, list) else 0
        device = torch.device("cuda", index) if resolved.accelerator == "cuda" else torch.device(resolved.accelerator)
        return Runtime(resolved.accelerator, resolved.devices, device, progress=progress, asked_precision=precision)
    check_launch(resolved.count)
    fabric = Fabric(accelerator=resolved.accelerator, devices=resolved.devices, strategy="ddp")
    fabric.launch()
    return Runtime(
        resolved.accelerator,
        resolved.devices,
        fabric.device,
        fabric.global_rank,
        fabric.world_size,
        progress and fabric.is_global_zero,
        precision,
    )


def find_devices(accelerator: str, devices: Any) -> Devices:
    """Return the devices of an evaluation; arguments and errors as for :func:`launch`."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
    try:
        return resolve_devices(accelerator, devices)
    except DeviceError as error:
        raise DeviceError(str(error).replace("--trainer.", "--")) from None


@contextmanager
def quiet(seed: int) -> Iterator[None]:
    """Seed everything inside the block, keep Lightning's notices down, and leave the generators as they were."""
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with isolate_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated")
            warnings.filterwarnings("ignore", message="Found .* in eval mode at the start of training")
            warnings.filterwarnings("ignore", message="The number of training batches .* is smaller than the logging")
            random.seed(seed)
            np.random.seed(seed)  # timm's Mixup draws from it
            torch.manual_seed(seed)
            yield
    finally:
        logger.setLevel(level)


def environment(runtime: Runtime) -> dict[str, Any]:
    """Return what is needed to repeat a result: versions, commit, hardware, and what of it was used."""
    cuda = runtime.accelerator == "cuda"
    used = {
        "accelerator": runtime.accelerator,
        "device": torch.cuda.get_device_name(runtime.device) if cuda else "cpu",
        "processes": runtime.world_size,
        "precision": runtime.precision,
    }
    return {**provenance(), "used": used}
