"""Samples and their order: every random choice about a sample is a function of (seed, epoch, index)."""

import hashlib
import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightly.data import LightlyDataset
from torch.utils.data import DataLoader, Dataset

from nepa_plugin.data.errors import DataError
from nepa_plugin.data.files import IMAGE_ERRORS, MAX_PIXELS, pixel_limit
from nepa_plugin.data.transforms import crop_flip

SampleKey = tuple[int, int]  # (epoch, index)


def sample_seed(*key: int) -> int:
    """Return the seed that belongs to ``key``: the run's seed, the epoch, and the image's index."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "little")


@contextmanager
def torch_seeded(*key: int) -> Iterator[None]:
    """Make torch's global CPU generator a function of ``key`` inside the block, and as before after it."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(sample_seed(*key))
    try:
        yield
    finally:
        torch.set_rng_state(state)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Do the same for all global CPU generators: torch's, Python's and NumPy's."""
    states = random.getstate(), np.random.get_state()
    random.seed(sample_seed(*key))
    np.random.seed(sample_seed(*key))
    try:
        with torch_seeded(*key):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def generators_of(transform: Any) -> Callable[..., AbstractContextManager[None]]:
    """Return what seeds the generators that a transform draws from: NEPA's own draws from torch's alone, faster."""
    return torch_seeded if crop_flip(transform) is not None else seeded


class SeededDataset(Dataset[tuple[Any, int, str]]):
    """A view of a ``LightlyDataset`` whose augmentation depends on (seed, epoch, index) only.

    Args:
        dataset: The images.
        transform: From a PIL image to a tensor, or a list of views.
        seed: Seed of the run.
        indices: The images to use, by index into ``dataset``.
        on_bad_image: ``"error"``, or ``"skip"`` to take the next readable image instead.
    """

    def __init__(
        self,
        dataset: LightlyDataset,
        transform: Callable[..., Any],
        seed: int,
        indices: list[int],
        on_bad_image: str = "error",
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.indices = indices
        self.on_bad_image = on_bad_image
        self.seeded = generators_of(transform)
        self.max_pixels: int | None = getattr(dataset, "max_pixels", MAX_PIXELS)

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, position: int) -> tuple[Any, int, str]:
        """Return (image, class index, filename) of the image at ``position`` of the dataset."""
        image, target, filename = self.dataset[position]
        return image, target, filename

    def view(self, image: Any, key: tuple[int, int, int]) -> Any:
        """Return the augmented image; ``key`` is (seed, epoch, index)."""
        with self.seeded(*key):
            return self.transform(image)

    def __getitem__(self, key: SampleKey | int) -> tuple[Any, int, str]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        for offset in range(len(self)):
            position = self.indices[(index + offset) % len(self)]
            try:
                with pixel_limit(self.max_pixels):
                    image, target, filename = self.load(position)
            except IMAGE_ERRORS as error:
                name = self.dataset.index_to_filename(self.dataset.dataset, position)
                if self.on_bad_image == "skip":
                    warnings.warn(f"Skipped {name}, which became unreadable: {error}", stacklevel=1)
                    continue
                raise DataError(f"{Path(self.dataset.input_dir or '.') / name} cannot be read: {error}") from error
            with pixel_limit(self.max_pixels):  # Pillow looks at the size of a crop, too
                return self.view(image, (self.seed, epoch, index)), target, filename
        raise DataError(f"{self.dataset.input_dir} holds no readable image.")


#: The class index of a sample that only keeps a process in step with the others; not to be scored.
PADDING = -1


class EqualShares(Dataset[tuple[Any, int, str]]):
    """Samples ``rank::world_size`` of a dataset, as many for every rank.

    Ranks that would have one fewer repeat a sample with class :data:`PADDING`: with sharded weights every forward pass
    needs all ranks, and one with a batch more than the others would wait for them for ever.

    Args:
        dataset: The samples, at least one.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(self, dataset: SeededDataset, rank: int = 0, world_size: int = 1) -> None:
        self.dataset = dataset
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.world_size)

    def __getitem__(self, index: int) -> tuple[Any, int, str]:
        place = index * self.world_size + self.rank
        image, target, filename = self.dataset[place % len(self.dataset)]
        return image, target if place < len(self.dataset) else PADDING, filename


class EpochBatchSampler:
    """Batches of (epoch, index) keys: a shuffle per epoch, split over processes, that can start anywhere.

    Batch s of rank r holds positions ``(s * world_size + r) * batch_size ...`` of the epoch's permutation, so that
    the union over ranks is the batch a single process of ``world_size`` times the size would see. The last
    incomplete global batch of an epoch is dropped, accumulated batches included: every optimizer step has all its
    images, and as many steps make an epoch with accumulation as without.

    Args:
        num_samples: Size of the dataset.
        batch_size: Batch size per device.
        seed: Seed of the run.
        rank: This process.
        world_size: Number of processes.
        position: Returns (epoch, batches of it already trained on); asked whenever iteration starts.
        accumulate: Batches of each process that make one optimizer step.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        position: Callable[[int], tuple[int, int]] = lambda length: (0, 0),
        accumulate: int = 1,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.position = position
        self.accumulate = accumulate

    def __len__(self) -> int:
        return self.num_samples // (self.batch_size * self.world_size * self.accumulate) * self.accumulate

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, start = self.position(len(self))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.num_samples, generator=generator)

        def batches() -> Iterator[list[SampleKey]]:
            for step in range(start, len(self)):
                first = (step * self.world_size + self.rank) * self.batch_size
                yield [(epoch, i) for i in order[first : first + self.batch_size].tolist()]

        return batches()


class ResumableLoader(DataLoader[Any]):
    """A ``DataLoader`` whose batch sampler knows where to go on; tells Lightning so by having a (stateless) state."""

    def __iter__(self) -> Any:
        # Lightning asks for an iterator before it restores its progress from a checkpoint. Nothing may be decided, and
        # no worker may prefetch, until the first batch is asked for.
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the position is in the trainer's progress, which Lightning saves."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing, see :meth:`state_dict`."""


def loader_workers(num_workers: int | None, processes: int) -> int:
    """Return the loader processes of each of ``processes`` here: what is given, else their share of the cores."""
    if num_workers is not None:
        return num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if cores <= 2 else min(16, cores // max(1, processes))
