"""Time to draw the block masks of 256 images on the CPU: lightly's image by image, and this package's of a whole batch.

python benchmarks/masks.py
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from lightly.data.ijepa_collate import IJEPAMaskCollator
from lightly.models.utils import random_block_mask

from nepa_plugin.methods.masks import BlockMasks, random_block_masks

IMAGES, GRID = 256, 16


def milliseconds(draws: list[Callable[[], Any]], rounds: int = 20) -> list[float]:
    """Return the median time of each, taken in turns."""
    times: list[list[float]] = [[] for _ in draws]
    for _ in range(rounds + 1):
        for draw, taken in zip(draws, times, strict=True):
            start = time.perf_counter()
            draw()
            taken.append(1000 * (time.perf_counter() - start))
    return [statistics.median(taken[1:]) for taken in times]


def main() -> None:
    paper = (0.85, 1.0), (0.15, 0.2), (0.75, 1.5)
    lightlys, ours = IJEPAMaskCollator(GRID, 1, *paper, 1, 4, 10), BlockMasks(GRID, *paper, 4, 10)
    cases = {
        "I-JEPA": [lambda: lightlys([0] * IMAGES), lambda: ours(IMAGES)],
        "iBOT, two views": [
            lambda: random_block_mask((2 * IMAGES, GRID, GRID)),
            lambda: random_block_masks(2 * IMAGES, GRID),
        ],
    }
    print(f"{IMAGES} images, {GRID}x{GRID} patches, {torch.get_num_threads()} threads")
    for name, draws in cases.items():
        before, after = milliseconds(draws)
        print(f"{name}: {before:.1f} ms image by image, {after:.1f} ms for a batch at once, {before / after:.1f} times")


if __name__ == "__main__":
    main()
