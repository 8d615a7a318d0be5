"""Images at their own aspect ratio and size: a batch holds images of one grid of patches, batches have many."""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nepa_plugin.data.errors import DataError
from nepa_plugin.data.files import IMAGE_ERRORS, in_threads, pixel_limit
from nepa_plugin.data.pipelines import PilPipeline, ViewKey
from nepa_plugin.data.samples import EpochBatchSampler, SampleKey, torch_seeded
from nepa_plugin.data.tables import Table

Grid = tuple[int, int]  # (rows, columns) of patches


def grid_of(width: int, height: int, patch_size: Grid, max_tokens: int, min_side: int | None = None) -> Grid:
    """Return the grid of patches that an image is seen as.

    It has the image's aspect ratio, to a patch, and its size: a larger image is reduced to ``max_tokens`` patches, and
    one whose shorter side is below ``min_side`` is enlarged. Where both do not go together, the longer side is cut.

    Args:
        width: Of the image, in pixels.
        height: Of the image, in pixels.
        patch_size: (height, width) of a patch in pixels.
        max_tokens: The most patches.
        min_side: The shorter side of the smallest image, in pixels; by default one patch.
    """
    rows, columns = height / patch_size[0], width / patch_size[1]
    scale = min(1.0, math.sqrt(max_tokens / (rows * columns)))
    if min_side is not None:
        scale = max(scale, min_side / min(width, height))
    wanted = rows * scale, columns * scale
    around = [(max(1, math.floor(side)), max(1, math.ceil(side))) for side in wanted]
    grids = [(r, c) for r in around[0] for c in around[1] if r * c <= max_tokens]
    if grids:
        return min(grids, key=lambda grid: _distance(grid, wanted))
    short = min(max(1, round(min(wanted))), math.isqrt(max_tokens))
    long = max_tokens // short
    return (short, long) if wanted[0] < wanted[1] else (long, short)


def merged(grids: Sequence[Grid], least: int) -> list[Grid]:
    """Return the grids of images, with none that fewer than ``least`` images have.

    A rarer one gives way to the nearest of the others, by aspect ratio and number of patches: its images would fill no
    batch, and never be seen.

    Args:
        grids: Of each image.
        least: Images of a batch, over all devices.
    """
    counts = Counter(grids)
    moved = {grid: grid for grid in counts}
    while len(counts) > 1:
        rarest = min(counts, key=lambda grid: (counts[grid], grid))
        if counts[rarest] >= least:
            break
        count = counts.pop(rarest)
        nearest = min(counts, key=lambda grid: (_distance(grid, rarest), grid))
        counts[nearest] += count
        moved = {grid: nearest if now == rarest else now for grid, now in moved.items()}
    return [moved[grid] for grid in grids]


def _distance(one: Grid, other: tuple[float, float]) -> float:
    rows, columns = (math.log(a / b) for a, b in zip(one, other, strict=True))
    return math.hypot(rows, columns)


@dataclass(frozen=True)
class NativeSizes:
    """The grids of the images that are used.

    Attributes:
        grids: (rows, columns) of patches of each image.
        patch_size: (height, width) of a patch in pixels.
    """

    grids: list[Grid]
    patch_size: Grid

    def pixels(self, index: int) -> Grid:
        """Return (height, width) in pixels of what is made of an image."""
        return self._pixels(self.grids[index])

    def _pixels(self, grid: Grid) -> Grid:
        return grid[0] * self.patch_size[0], grid[1] * self.patch_size[1]

    @property
    def counts(self) -> dict[Grid, int]:
        """How many images there are of each (height, width) in pixels, the most frequent first."""
        return {self._pixels(grid): count for grid, count in Counter(self.grids).most_common()}

    @property
    def fewest_tokens(self) -> int:
        """Patches of the smallest grid."""
        return min(math.prod(grid) for grid in self.grids)

    def __str__(self) -> str:
        shown = [f"{w}x{h} pixels ({n} images)" for (h, w), n in list(self.counts.items())[:5]]
        more = f" and {len(self.counts) - 5} more" if len(self.counts) > 5 else ""
        tokens = sum(math.prod(grid) for grid in self.grids) / len(self.grids)
        return f"{', '.join(shown)}{more}; {tokens:.1f} patches on average"


class GridBatchSampler(EpochBatchSampler):
    """Batches of images of one grid, each as soon as the epoch's permutation has brought enough of them.

    With one grid the batches are those of :class:`~nepa_plugin.data.samples.EpochBatchSampler`. What is left over of
    each grid is dropped, another part in every epoch. All processes have the same grid in the same step.

    Args:
        grids: Of each image.
        *args: As there, from ``batch_size`` on.
        **kwargs: As there.
    """

    def __init__(self, grids: Sequence[Grid], *args: Any, **kwargs: Any) -> None:
        super().__init__(len(grids), *args, **kwargs)
        kinds = {grid: kind for kind, grid in enumerate(dict.fromkeys(grids))}
        self.kinds = np.array([kinds[grid] for grid in grids])

    @property
    def _together(self) -> int:
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        batches = int((np.bincount(self.kinds) // self._together).sum())
        return batches // self.accumulate * self.accumulate

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, start = self.position(len(self))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.num_samples, generator=generator).numpy()
        kinds, together = self.kinds[order], self._together
        places = [np.flatnonzero(kinds == kind) for kind in range(int(kinds.max()) + 1)]
        whole = np.concatenate([own[: len(own) // together * together].reshape(-1, together) for own in places])
        batches = order[whole[np.argsort(whole[:, -1])]][start : len(self)]
        first = self.rank * self.batch_size
        own = batches[:, first : first + self.batch_size].tolist()
        return iter([[(epoch, i) for i in batch] for batch in own])


class NativePipeline(PilPipeline):
    """Everything in the loader, by PIL, to the size that each image has.

    Args:
        transform: From (height, width) in pixels to an augmentation.
        sizes: Of the images.
    """

    def __init__(self, transform: Callable[[Grid], Callable[[Image.Image], list[Tensor]]], sizes: NativeSizes) -> None:
        self.transforms = {size: transform(size) for size in sizes.counts}
        self.sizes = sizes

    def view(self, image: Any, key: ViewKey) -> Any:
        """Return the image's part of a batch; ``key`` is (seed, epoch, index)."""
        with torch_seeded(*key):
            return self.transforms[self.sizes.pixels(key[2])](image)


def check_native(method: Any) -> None:
    """Check that a method trains on images of several sizes.

    Args:
        method: A :class:`~nepa_plugin.methods.Method`.

    Raises:
        DataError: If it does not.
    """
    name = type(method).__name__
    if not getattr(method, "takes_native_sizes", False):
        raise DataError(f"data.max_tokens: {name} takes square images alone, NEPA others, too; leave it out.")
    if method.masks is not None:
        raise DataError("data.max_tokens: input_mask_ratio draws masks of one size; leave one of them out.")
    if not method.backbone.dynamic_img_size:
        raise DataError(
            "data.max_tokens needs a backbone that takes images of any size: add "
            "--model.backbone_args.dynamic_img_size true."
        )


def native_sizes(
    images: Any, indices: Sequence[int], patch_size: Grid, max_tokens: int, min_side: int | None, least: int
) -> NativeSizes:
    """Return the grids of a dataset's images; of each image the head is read.

    Args:
        images: A folder or a table of images.
        indices: Which of them are used.
        patch_size: (height, width) of a patch in pixels.
        max_tokens: The most patches.
        min_side: The shorter side of the smallest image, in pixels.
        least: Images of a batch, over all devices.

    Raises:
        DataError: If an image cannot be read.
    """
    try:
        stored = _table_sizes(images, indices) if isinstance(images.dataset, Table) else _file_sizes(images, indices)
    except IMAGE_ERRORS as error:
        raise DataError(f"{images.input_dir}: {error}. Images are not to change while they are read.") from error
    grids = [grid_of(width, height, patch_size, max_tokens, min_side) for width, height in stored]
    return NativeSizes(merged(grids, least), patch_size)


def _file_sizes(images: Any, indices: Sequence[int]) -> list[Grid]:
    files = images.get_filenames()

    def one(index: int) -> Grid:
        with Image.open(os.path.join(images.input_dir, files[index])) as image:
            return image.size

    with pixel_limit(None):
        return in_threads(one, indices)


def _table_sizes(images: Any, indices: Sequence[int]) -> list[Grid]:
    found, wanted = {}, set(indices)
    with pixel_limit(None):
        for index, (_, file, _) in enumerate(images.dataset.files()):
            if file is not None and index in wanted:
                with Image.open(file) as image:
                    found[index] = image.size
    return [found[index] for index in indices]
