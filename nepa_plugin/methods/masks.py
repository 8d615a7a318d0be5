"""Block masks of a whole batch at once: what lightly draws image by image, in loops that a GPU step would wait for."""

import math

import torch
from lightly.data.ijepa_collate import IJEPAMaskCollator
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


def to_device(drawn: Tensor, device: torch.device | str) -> Tensor:
    """Copy what was drawn on the CPU, without making the host wait for what the device still has to do."""
    return drawn.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else drawn.to(device)


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

    def sample(self, batch_size: int, device: torch.device | str) -> tuple[Tensor, list[Tensor]]:
        """Draw the masks of a batch.

        Args:
            batch_size: Images.
            device: Where the masks go.

        Returns:
            Indices of the context patches (B, K), and per target block of its patches (B, M). No context patch is in a
            target, but where that would leave too few; K is the smallest number in the batch.
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
        blocks = to_device(first_true(targets, math.prod(target_size)), device)
        return to_device(first_true(context, keep), device), list(blocks.unbind(dim=1))


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
