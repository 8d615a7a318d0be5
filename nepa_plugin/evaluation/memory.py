"""The memory that an evaluation will need, by calculation, before it starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from nepa_plugin.evaluation.features import depth_names, pool_names
from nepa_plugin.evaluation.images import Images
from nepa_plugin.evaluation.knn import bank_rows
from nepa_plugin.evaluation.options import EvaluationOptions
from nepa_plugin.evaluation.processes import Runtime
from nepa_plugin.evaluation.streamed import LR_FACTORS

GB = 1e9
FLOAT = 4
#: Bytes per image of paths and labels, in the lists that datasets keep; measured.
PER_FILE = 1000
#: Where Linux says what the container that this process is in may use.
CONTAINER = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Step:
    """What one step of an evaluation needs, in bytes.

    Attributes:
        name: The step.
        host: Of host memory, by all processes together.
        device: Of each device's memory.
        remedy: What to change where it is too much.
    """

    name: str
    host: float
    device: float
    remedy: str = "Use fewer images, or a machine with more memory."


@dataclass(frozen=True)
class Sizes:
    """What the memory of an evaluation follows from.

    Attributes:
        train: Training images.
        val: Validation images.
        classes: Number of classes.
        width: Channels of a token.
        tokens: Tokens of an image.
        depths: Number of depths.
        pools: Number of poolings, those side by side not counted.
        processes: Number of processes.
        cuda: Whether features are computed on CUDA devices.
    """

    train: int
    val: int
    classes: int
    width: int
    tokens: int
    depths: int
    pools: int
    processes: int = 1
    cuda: bool = False

    @classmethod
    def of(cls, model: Any, tokens: int, images: Images, runtime: Runtime) -> "Sizes":
        """Return the sizes of a model and its images."""
        return cls(
            train=len(images.train),
            val=len(images.val),
            classes=len(images.classes),
            width=int(model.num_features),
            tokens=tokens,
            depths=len(depth_names(model)),
            pools=len(pool_names(model)),
            processes=runtime.world_size,
            cuda=runtime.accelerator == "cuda",
        )


def memory_steps(
    sizes: Sizes, protocols: Sequence[str], options: EvaluationOptions, features: int, kept_tokens: bool
) -> list[Step]:
    """Return the memory that the steps of an evaluation need, one after the other.

    Args:
        sizes: Of the model and the images.
        protocols: As for :func:`nepa_plugin.evaluation.evaluate`.
        options: As for :func:`nepa_plugin.evaluation.evaluate`.
        features: Pooled features of an image that are computed before the probes.
        kept_tokens: Whether all tokens of one depth are computed, too.

    Returns:
        The steps, the images' paths first, which are there throughout.
    """
    n, m, width, solver = sizes.train, sizes.val, sizes.width, options.linear.choose(sizes.train)
    forward = _forward(sizes, options.batch_size)
    steps = [Step("paths and labels", PER_FILE * (n + m) * sizes.processes, 0)]
    row = FLOAT * width * (features + (sizes.tokens if kept_tokens else 0))
    if row:
        shares = 2 if sizes.processes > 1 else 1  # each process's own, and all of them in process zero
        networks = 2 if "readout" in protocols and solver == "logistic" and options.floor else 1
        kept = max(n, m) if options.cache else networks * (n + m)
        remedy = "Lower --linear.logistic_limit: the readout then keeps no features."
        if not options.cache:
            remedy += " Or leave the cache on: features are then read from the disk."
        steps.append(_step("features", sizes, row * (kept + (shares - 1) * n), forward, remedy))
    if {"knn", "readout"} & set(protocols):
        rows = min(bank_rows(m), n)
        steps.append(_step("kNN", sizes, 0, FLOAT * (2 * (m + rows) * width + rows * m) + 24 * m * options.k))
    if solver == "logistic" and {"linear", "readout"} & set(protocols):
        wide = width * (min(options.concat, sizes.depths) if "readout" in protocols else 1)
        # the features put together and as scikit-learn standardises them, partly in float64; logits and their gradient;
        # the solver's history
        host = FLOAT * (n * (5 * wide + 3 * sizes.classes) + 20 * wide * sizes.classes)
        remedy = "Lower --linear.logistic_limit: linear probes are then trained with SGD."
        steps.append(Step("logistic regression", host, 0, remedy))
    if solver == "sgd" and "readout" in protocols:
        places = sizes.depths * (sizes.pools + 1)
        queries = FLOAT * m * width * sizes.depths * sizes.pools
        neighbours = m * options.k * places * (FLOAT + 8)
        similar = FLOAT * m * options.batch_size * (options.concat + 2)
        weights = FLOAT * len(LR_FACTORS) * sizes.classes * width * sizes.depths * (sizes.pools + options.concat)
        logits = FLOAT * len(LR_FACTORS) * sizes.classes * places * options.linear.batch_size / sizes.processes
        found = queries * (2 if sizes.cuda else 1) * sizes.processes  # before they move to the device
        remedy = "Use fewer validation images, or a smaller --concat."
        neighbours_need = queries + neighbours + similar + forward
        steps.append(_step("neighbours at every depth", sizes, found, neighbours_need, remedy))
        remedy = "Use a smaller --concat, or a smaller --linear.batch_size."
        steps.append(_step("probes of every depth", sizes, 0, 3 * weights + 4 * logits + forward, remedy))
    return steps


def check_memory(steps: Sequence[Step], device: torch.device) -> None:
    """Check that what is free is enough for each of the steps.

    Args:
        steps: Of :func:`memory_steps`.
        device: Of this process.

    Raises:
        ValueError: If it is not; the message says which step needs how much, and what to change.
    """
    always, *others = steps
    free = {"host": _free_host_memory(), "device": None}
    if device.type == "cuda":
        free["device"] = torch.cuda.mem_get_info(device)[0]
    for step in others:
        for place, available in free.items():
            need = getattr(step, place) + getattr(always, place)
            if available is not None and need > available:
                where = "memory" if place == "host" else f"memory on {device}"
                raise ValueError(
                    f"{step.name} would need {need / GB:.1f} GB of {where}, and {available / GB:.1f} GB are free. "
                    f"{step.remedy}"
                )


def _forward(sizes: Sizes, batch_size: int) -> float:
    """Return the bytes of a forward pass whose tokens are read at every depth."""
    per_token = sizes.width * (sizes.depths + 12)  # tokens that are kept, and a block at work: MLP, attention, sums
    return FLOAT * batch_size * sizes.tokens * per_token


def _step(name: str, sizes: Sizes, host: float, device: float, remedy: str | None = None) -> Step:
    """Return a step whose device's part is the host's where there is no device."""
    arguments = {} if remedy is None else {"remedy": remedy}
    if sizes.cuda:
        return Step(name, host, device, **arguments)
    return Step(name, host + sizes.processes * device, 0, **arguments)


def _free_host_memory() -> int:
    """Return the bytes that this machine, or the container that this process is in, has left."""
    free = psutil.virtual_memory().available
    try:
        limit, used = (int((CONTAINER / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = next(line for line in (CONTAINER / "memory.stat").read_text().splitlines() if line.startswith("file "))
        return min(free, limit - used + int(cached.split()[1]))
    except (OSError, ValueError, StopIteration):  # there is no container, or no limit
        return free
