"""The labelled images of an evaluation, and loaders of them for one or several processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightly.data import LightlyDataset
from torch.utils.data import DataLoader

from nepa_plugin.data.evaluation import evaluation_images
from nepa_plugin.data.files import MAX_PIXELS
from nepa_plugin.data.samples import (
    DataError,
    EpochBatchSampler,
    ResumableLoader,
    SeededDataset,
    loader_workers,
)
from nepa_plugin.evaluation.processes import Runtime
from nepa_plugin.runtime.step_seed import trained_batches

Split = Literal["train", "val"]


@dataclass
class Images:
    """Training and validation images of the same classes.

    Attributes:
        source: What they were opened from.
        train: Images to fit on.
        val: Images to score.
        classes: The classes' names, in the order of the labels.
    """

    source: str
    train: LightlyDataset
    val: LightlyDataset
    classes: list[str]

    def split(self, name: Split) -> LightlyDataset:
        """Return one of the two."""
        return self.train if name == "train" else self.val


def open_images(source: str | Path, world_size: int = 1, max_pixels: int = MAX_PIXELS) -> Images:
    """Open labelled images and check that all of them can be read.

    Args:
        source: ``"digits"``, or a folder that holds ``train`` and ``val`` with a sub-folder per class.
        world_size: Number of processes that share the validation images.
        max_pixels: The most pixels that an image may have.

    Returns:
        The images.

    Raises:
        DataError: If they cannot be evaluated on; the message names the folder or file.
    """
    train, val = evaluation_images(source, max_pixels)
    for images in (train, val):
        check = images.check()
        if check.bad:
            raise check.refusal(images.input_dir, "Remove or repair them.")
    if min(len(train), len(val)) < world_size:
        raise DataError(f"{source} has fewer images than the {world_size} processes that share them.")
    return Images(str(source), train, val, list(train.dataset.classes))


def ordered_loader(
    images: LightlyDataset,
    transform: Callable[..., Any],
    runtime: Runtime,
    batch_size: int,
    num_workers: int | None = None,
    used: Sequence[int] | None = None,
) -> DataLoader[Any]:
    """Return batches of this process's images, ``rank::world_size``, in order: every image once over all processes.

    ``used`` are the images to take, by index; all by default.
    """
    indices = list(range(len(images)) if used is None else used)[runtime.rank :: runtime.world_size]
    return DataLoader(
        SeededDataset(images, transform, 0, indices),
        batch_size=batch_size,
        num_workers=loader_workers(num_workers, runtime.world_size),
        pin_memory=runtime.device.type == "cuda",
        generator=torch.Generator(),  # so that to look, while something trains, draws nothing from its random numbers
    )


def shuffled_loader(
    images: LightlyDataset,
    transform: Callable[..., Any],
    runtime: Runtime,
    batch_size: int,
    seed: int,
    trainer: Any,
    num_workers: int | None = None,
    used: Sequence[int] | None = None,
) -> DataLoader[Any]:
    """Return shuffled batches for training; order and augmentation follow from (seed, epoch, index).

    Args:
        images: The images.
        transform: The augmentation.
        runtime: The processes that share an epoch.
        batch_size: Per process.
        seed: Of the order and the augmentation.
        trainer: Whose progress says which epoch it is.
        num_workers: Loader processes.
        used: The images to take, by index; all by default.

    Returns:
        A loader of (images, labels, filenames).
    """
    dataset = SeededDataset(images, transform, seed, list(range(len(images)) if used is None else used))
    sampler = EpochBatchSampler(
        len(dataset),
        batch_size,
        seed,
        runtime.rank,
        runtime.world_size,
        lambda length: divmod(trained_batches(trainer), max(1, length)),
        trainer.accumulate_grad_batches,
    )
    workers = loader_workers(num_workers, runtime.world_size)
    return ResumableLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=runtime.device.type == "cuda",
    )


def batch_per_process(batch_size: int, num_images: int, world_size: int) -> int:
    """Return the images per process of a global batch, at most all of them."""
    return max(1, min(batch_size, num_images) // world_size)
