"""Which devices a command uses, checked before anything is built."""

import os
import re
from dataclasses import dataclass
from typing import Any

import torch


class DeviceError(ValueError):
    """The machine does not have what was asked for."""


@dataclass(frozen=True)
class Devices:
    """Accelerator and devices as Lightning takes them, and how many there are."""

    accelerator: str
    devices: Any
    count: int


def resolve_devices(accelerator: str = "auto", devices: Any = "auto") -> Devices:
    """Turn Lightning's ``accelerator`` and ``devices`` into what this machine has.

    Args:
        accelerator: ``"auto"`` (CUDA if there is one, else CPU), ``"cuda"``, ``"gpu"``, ``"cpu"``, or
            ``"mps"``, which is passed on.
        devices: ``"auto"`` (every GPU; one process on the CPU), a number, or a list of GPU indices.

    Returns:
        The devices.

    Raises:
        DeviceError: If CUDA is asked for and missing, more devices than there are, or something that is no device.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if accelerator == "auto":
        accelerator = "cuda" if gpus else "cpu"
    if accelerator in ("gpu", "cuda"):
        accelerator = "cuda"
        if not gpus:
            raise DeviceError("CUDA was asked for, but no CUDA device is available. Use --trainer.accelerator cpu.")
    if accelerator not in ("cuda", "cpu", "mps"):
        raise DeviceError(f"--trainer.accelerator {accelerator!r} is none of auto, cuda, gpu, cpu and mps.")
    if accelerator == "mps":
        return Devices(accelerator, devices, devices if isinstance(devices, int) else 1)
    # torchrun has already started its processes, whether there are as many cores or not
    cores = max(os.cpu_count() or 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    available = gpus if accelerator == "cuda" else cores
    what = "CUDA device(s)" if accelerator == "cuda" else "CPU core(s) and no CUDA device in use"
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if devices in ("auto", -1):
        devices = gpus if accelerator == "cuda" else 1
    if isinstance(devices, str):
        if not re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*,?\s*", devices):
            raise DeviceError(f"--trainer.devices {devices!r} is no number, no list of GPU indices, and not 'auto'.")
        devices = [int(d) for d in devices.split(",") if d.strip()]
    wanted = len(devices) if isinstance(devices, list) else int(devices)
    if isinstance(devices, list) and len(set(devices)) < len(devices):
        raise DeviceError(f"--trainer.devices {devices} names a device twice.")
    missing = [d for d in devices if d >= available] if isinstance(devices, list) else []
    if wanted < 1 or wanted > available or missing:
        raise DeviceError(
            f"--trainer.devices {devices} asks for more than this machine has: {available} {what}. Lower it, or leave "
            "it out."
        )
    return Devices(accelerator, devices, wanted)


def check_launch(processes: int) -> None:
    """Check that the other processes will be there, before Lightning waits for them without a word.

    Args:
        processes: How many the command wants.

    Raises:
        DeviceError: If the environment says that this is one process of a group, but not of how many.
    """
    if processes > 1 and "LOCAL_RANK" in os.environ and not {"WORLD_SIZE", "SLURM_NTASKS"} & set(os.environ):
        raise DeviceError(
            "LOCAL_RANK is set and WORLD_SIZE is not, so no other process would be started. Take LOCAL_RANK out of the "
            "environment (unset LOCAL_RANK), or set WORLD_SIZE too if your launcher starts every process itself."
        )


def check_compiler(device: str) -> None:
    """Compile and run one addition, so that a missing compiler is an error before training.

    Args:
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        DeviceError: If ``torch.compile`` does not work here.
    """
    one = torch.ones(8, device=device)
    try:
        torch.compile(lambda x: x + 1)(one)
    except Exception as error:  # dynamo wraps whatever the compiler raises
        needs = "a C++ compiler (g++)" if device == "cpu" else "Triton and a C compiler (gcc)"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DeviceError(
            f"torch.compile does not work on this machine: {reason} It needs {needs} on {device}; install that, or "
            "leave out --compile."
        ) from error
