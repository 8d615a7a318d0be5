"""A resumed run sees the images, crops and dropout of one that was never stopped, and reads nothing twice."""

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, HOOKS
from mmengine.runner import IterBasedTrainLoop


class Draw(int):
    """Index of an image that carries the seed of its augmentation."""

    seed: int

    def __new__(cls, index: int, seed: int) -> "Draw":
        """Return the index."""
        draw = super().__new__(cls, index)
        draw.seed = seed
        return draw

    def __reduce__(self) -> tuple[type["Draw"], tuple[int, int]]:
        return Draw, (int(self), self.seed)

    def seed_generators(self) -> None:
        """Seed what mmcv's and mmsegmentation's transforms draw from."""
        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)
        torch.manual_seed(self.seed)


@DATA_SAMPLERS.register_module()
class ResumableSampler(InfiniteSampler):
    """mmengine's ``InfiniteSampler``, in its order, that can begin later and seeds the augmentation of every draw.

    What is cropped from an image is then a function of the run's seed and of the number of draws before it, not of the
    loader's processes and what they have done so far. Datasets derived from ``SegmentationFolder`` take the seed. The
    arguments are those of mmengine's sampler.
    """

    #: Draws of this process that are left out at the beginning.
    start: int = 0

    def __iter__(self) -> Iterator[int]:
        """Iterate over the indices without an end."""
        first = self.start * self.world_size + self.rank
        draws = itertools.islice(self._infinite_indices(), first, None, self.world_size)
        for number, index in zip(itertools.count(first, self.world_size), draws, strict=False):
            yield Draw(index, (self.seed * 1_000_003 + number) % 2**63)


class _Advanced:
    """Answers mmengine's loop, which asks for every batch before the one to go on with, without reading them."""

    def __init__(self, batches: Iterator[Any], steps: int) -> None:
        self._batches, self._steps = batches, steps

    def __iter__(self) -> "_Advanced":
        return self

    def __next__(self) -> Any:
        if self._steps:
            self._steps -= 1
            return None
        return next(self._batches)


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Makes a resumed run the one that was never stopped; needs :class:`ResumableSampler`.

    mmengine reads and augments all images of the steps before, to throw them away; here the sampler begins later. Every
    step's dropout and stochastic depth depend on the run's seed, the step and the process alone.
    """

    def before_train_epoch(self, runner: Any) -> None:
        """Go on with the images after those of the checkpoint."""
        loop, loader = runner.train_loop, runner.train_dataloader
        ours = isinstance(loop, IterBasedTrainLoop) and isinstance(loader.sampler, ResumableSampler)
        if not ours or not loop.iter or loader.batch_size is None:
            return
        loader.sampler.start = loop.iter * loader.batch_size
        loop.dataloader_iterator = None  # its processes end, or start over
        loop.dataloader_iterator = _Advanced(iter(loader), loop.iter)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Seed the generators."""
        torch.manual_seed(((runner.seed * 1_000_003 + runner.iter) * 1_009 + get_rank()) % 2**63)
