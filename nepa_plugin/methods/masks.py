"""What methods draw once per batch, on the CPU: block masks and prefixes of all images at once.

lightly draws them image by image, in loops that a GPU step would wait for. Every class here maps a number of images to
tensors, drawn from torch's global CPU generator, and can be sent to a loader process.
"""

import math
from dataclasses import dataclass

import torch
from lightly.data.ijepa_collate import IJEPAMaskCollator
from lightly.models.utils import random_prefix_mask
from torch import Tensor


def rectangles(tops: Tensor, lefts: Tensor, heights: Tensor, widths: Tensor, grid: int) -> Tensor:
    """Return rectangles as masks.

    Args:
        tops: First row of each rectangle, (N,).
        lefts: First column, (N,).
        heights: Rows, (N,).
        widths: Columns, (N,).
        grid: Patches along a side.

    Returns:
        True inside, (N, grid, grid).
    """
    place = torch.arange(grid)
    rows = (place >= tops[:, None]) & (place < (tops + heights)[:, None])
    columns = (place >= lefts[:, None]) & (place < (lefts + widths)[:, None])
    return rows[:, :, None] & columns[:, None, :]


def first_true(mask: Tensor, count: int) -> Tensor:
    """Return the indices of the first ``count`` true elements along the last axis (..., N), as (..., count)."""
    return mask.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :count]


class BlockMasks(IJEPAMaskCollator):
    """I-JEPA's context and target blocks, drawn from torch's global CPU generator.

    The sizes, one for all images of a batch, are drawn by lightly; the places follow the same distribution as there. A
    context block may not touch the targets; where none of 20 places leaves it large enough, it may touch the last
    target, after 20 more the last two, and so on. Source: arXiv 2301.08243, appendix A, and lightly's
    ``IJEPAMaskCollator``.

    Args:
        grid: Patches along a side.
        context_scale: Range of the context block's area as a fraction of the image.
        target_scale: Range of a target block's area as a fraction of the image.
        target_aspect_ratio: Range of a target block's height over width.
        num_targets: Target blocks per image.
        min_keep: Every block keeps more patches than this.

    Raises:
        ValueError: If a block of the smallest size has no more than ``min_keep`` patches.
    """

    #: Places that are tried before a context block may touch one more target.
    ATTEMPTS = 20

    def __init__(
        self,
        grid: int,
        context_scale: tuple[float, float],
        target_scale: tuple[float, float],
        target_aspect_ratio: tuple[float, float],
        num_targets: int,
        min_keep: int,
    ) -> None:
        super().__init__(
            input_size=grid,
            patch_size=1,
            enc_mask_scale=context_scale,
            pred_mask_scale=target_scale,
            aspect_ratio=target_aspect_ratio,
            nenc=1,
            npred=num_targets,
            min_keep=min_keep,
        )
        del self._itr_counter  # shared between processes, which forbids a copy of the method
        self.grid = grid
        for seed in range(256):
            target, context = self._sizes(seed)
            self._check(target, "target")
            self._check(context, "context")

    def _check(self, block: tuple[int, int], what: str) -> None:
        if block[0] * block[1] <= self.min_keep:
            raise ValueError(
                f"I-JEPA's {what} blocks can be {block[0]}x{block[1]} patches on this {self.grid}x{self.grid} grid, "
                f"but must have more than min_keep={self.min_keep}: lower min_keep or raise {what}_scale."
            )

    def _sizes(self, seed: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (height, width) of the target blocks and of the context block of a batch."""
        generator = torch.Generator().manual_seed(seed)
        target = self._sample_block_size(generator, self.pred_mask_scale, self.aspect_ratio)
        return target, self._sample_block_size(generator, self.enc_mask_scale, (1.0, 1.0))

    def _blocks(self, size: tuple[int, int], count: int) -> Tensor:
        """Draw places for ``count`` blocks, and return them as masks (count, grid, grid)."""
        height, width = (torch.full((count,), side) for side in size)
        # As in lightly and the authors' code, no block reaches the last row or column.
        tops, lefts = (torch.randint(0, self.grid - side, (count,)) for side in size)
        return rectangles(tops, lefts, height, width, self.grid)

    def __call__(self, batch_size: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # lightly's takes samples
        """Draw the masks of a batch.

        Args:
            batch_size: Images.

        Returns:
            Indices of the context patches (B, K), and of the target blocks' patches (B, targets, M). No context patch
            is in a target, but where that would leave too few; K is the smallest number in the batch.
        """
        target_size, context_size = self._sizes(int(torch.randint(2**31, ())))
        self._check(target_size, "target")
        self._check(context_size, "context")
        targets = self._blocks(target_size, batch_size * self.npred).view(batch_size, self.npred, -1)
        taken = targets.cumsum(dim=1) > 0  # by the first target, by the first two, ...
        context = torch.zeros(batch_size, self.grid**2, dtype=torch.bool)
        missing = torch.arange(batch_size)
        for avoided in range(self.npred, -1, -1):
            for _ in range(self.ATTEMPTS):
                block = self._blocks(context_size, len(missing)).flatten(1)
                context[missing] = block & ~taken[missing, avoided - 1] if avoided else block
                missing = missing[context[missing].sum(dim=1) <= self.min_keep]
                if not len(missing):
                    break
            if not len(missing):
                break
        keep = int(context.sum(dim=1).min())
        return first_true(context, keep), first_true(targets, math.prod(target_size))


def random_block_masks(
    batch_size: int,
    grid: int,
    batch_mask_ratio: float = 0.5,
    mask_ratio: tuple[float, float] = (0.1, 0.5),
    min_per_block: int = 4,
    aspect_ratio: tuple[float, float] = (0.3, 1 / 0.3),
    attempts: int = 10,
) -> Tensor:
    """Draw iBOT's masks from torch's global CPU generator, in the distribution of lightly's ``random_block_mask``.

    The masked images' numbers of patches are spread evenly over ``mask_ratio``. Rectangles are added to a mask until it
    has its number, or none of ``attempts`` draws in a row fits.

    Args:
        batch_size: Images.
        grid: Patches along a side.
        batch_mask_ratio: Fraction of the images that are masked.
        mask_ratio: Range of the fraction of patches that is masked in these.
        min_per_block: Smallest area of a rectangle in patches.
        aspect_ratio: Range of a rectangle's height over width, drawn log-uniformly.
        attempts: Draws in a row that may fail.

    Returns:
        True where a patch is masked, (batch_size, grid, grid).
    """
    masked = int(batch_size * batch_mask_ratio)
    low, high = mask_ratio
    fractions = low + (high - low) * (torch.arange(masked) + torch.rand(masked)) / max(1, masked)
    wanted = (grid**2 * fractions.double()).long()
    masks = torch.zeros(batch_size, grid, grid, dtype=torch.bool)
    count, failed = torch.zeros(masked, dtype=torch.long), torch.zeros(masked, dtype=torch.long)
    open_ = (count < wanted).nonzero().squeeze(1)
    logs = [math.log(side) for side in aspect_ratio]
    while len(open_):
        left_over = wanted[open_] - count[open_]
        area = min_per_block + (left_over - min_per_block) * torch.rand(len(open_))
        aspect = torch.empty(len(open_)).uniform_(*logs).exp()
        heights, widths = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
        tops, lefts = ((torch.rand(len(open_)) * (grid - side + 1).clamp(min=1)).long() for side in (heights, widths))
        block = rectangles(tops, lefts, heights, widths, grid)
        current = masks[open_]
        new = (block & ~current).sum(dim=(1, 2))
        fits = (heights < grid) & (widths < grid) & (new > 0) & (new <= left_over)
        masks[open_] = current | (block & fits[:, None, None])
        count[open_] += new * fits
        failed[open_] = torch.where(fits, 0, failed[open_] + 1)
        open_ = open_[(count[open_] < wanted[open_]) & (failed[open_] < attempts)]
    return masks[torch.randperm(batch_size)]


@dataclass(frozen=True)
class PatchMasks:
    """iBOT's masks of the two global views.

    Attributes:
        grid: Patches along a side.
        batch_mask_ratio: Fraction of the views that are masked.
        mask_ratio: Range of the fraction of patches that is masked in these.
        min_per_block: Smallest area of a rectangle in patches.
    """

    grid: int
    batch_mask_ratio: float
    mask_ratio: tuple[float, float]
    min_per_block: int

    def draw(self, views: int) -> Tensor:
        """Draw the masks (views, grid, grid). Some patch of the batch is always masked."""
        masks = random_block_masks(views, self.grid, self.batch_mask_ratio, self.mask_ratio, self.min_per_block)
        if not masks.any():  # the mean over no patch is no number
            masks[0, 0, 0] = True
        return masks

    def __call__(self, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the masks of both views of a batch.

        Args:
            batch_size: Images.

        Returns:
            Which of the N patches are masked in the first views and then in the second ones (2 B, N), the indices of
            these into all 2 B x N (M,), and for each one over the number of them in its view (M,). On the device,
            finding where a mask is set would wait for all work before it.
        """
        masks = self.draw(2 * batch_size).flatten(1)
        weights = (1 / masks.sum(dim=1, keepdim=True).clamp(min=1)).expand_as(masks)
        return masks, masks.flatten().nonzero().squeeze(1), weights[masks]


@dataclass(frozen=True)
class BlockwiseMasks:
    """BEiT's masks: rectangles in every image, until a fraction of its patches is masked.

    Attributes:
        grid: Patches along a side.
        mask_ratio: Fraction of the patches that is masked.
        min_per_block: Smallest area of a rectangle in patches.
    """

    grid: int
    mask_ratio: float
    min_per_block: int

    def __call__(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Draw the masks of a batch.

        Args:
            batch_size: Images.

        Returns:
            Which of the N patches are masked (B, N), and the indices of these into all B x N (M,).
        """
        ratios = (self.mask_ratio, self.mask_ratio)
        masks = PatchMasks(self.grid, 1.0, ratios, self.min_per_block).draw(batch_size).flatten(1)
        return masks, masks.flatten().nonzero().squeeze(1)


@dataclass(frozen=True)
class RandomMasks:
    """A number of patches of each image, each as likely as any other.

    Attributes:
        num_patches: Patches of an image, N.
        masked: How many of them.
    """

    num_patches: int
    masked: int

    def __call__(self, batch_size: int) -> tuple[Tensor]:
        """Draw the masks of a batch: True where a patch is masked, (B, N)."""
        order = torch.rand(batch_size, self.num_patches).argsort(dim=1)
        return (order < self.masked,)


@dataclass(frozen=True)
class PrefixMasks:
    """AIM's prefixes of 1 ... N - 1 of the N patches.

    Attributes:
        num_patches: N.
    """

    num_patches: int

    def __call__(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Draw the prefixes of a batch.

        Args:
            batch_size: Images.

        Returns:
            Which of patches 1 ... N - 1 come after the prefix (B, N - 1), and the indices of these into all of them.
        """
        rest = self.num_patches - 1
        predicted = random_prefix_mask((batch_size, rest), max_prefix_length=rest, device="cpu")
        return predicted, predicted.flatten().nonzero().squeeze(1)
