"""Block masks: drawn for a batch at once, in the distribution of lightly's."""

import random

import pytest
import torch
from lightly.data.ijepa_collate import IJEPAMaskCollator
from lightly.models.utils import random_block_mask

from nepa_plugin.methods.masks import BlockMasks, first_true, random_block_masks, rectangles


def test_rectangles():
    masks = rectangles(*torch.tensor([[0, 2], [1, 0], [2, 1], [3, 4]]), grid=4)
    assert masks.int().tolist() == [
        [[0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]],
    ]


def test_first_true():
    mask = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 0, 0, 0]]) > 0
    assert first_true(mask, 2).tolist() == [[1, 3], [0, 1]]


# -- I-JEPA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "target_scale", "min_keep"), [(8, (0.1, 0.15), 4), (14, (0.15, 0.2), 10)])
def test_ijepas_blocks_are_distributed_as_lightlys(grid, target_scale, min_keep):
    torch.manual_seed(0)
    ours = BlockMasks(grid, (0.85, 1.0), target_scale, (0.75, 1.5), 4, min_keep)
    theirs = IJEPAMaskCollator(grid, 1, (0.85, 1.0), target_scale, (0.75, 1.5), 1, 4, min_keep)
    theirs.step = lambda: int(torch.randint(2**31, ()))  # otherwise the number of the batch
    batches, size, places = 40, 16, []
    contexts, targets = [], []
    for draw in (lambda: ours(size), lambda: theirs([0] * size)[1:]):
        target, place, smallest = [], torch.zeros(grid**2), []
        for _ in range(batches):
            indices, blocks = draw()
            indices = indices if torch.is_tensor(indices) else indices[0]
            blocks = blocks.unbind(1) if torch.is_tensor(blocks) else blocks
            smallest.append(indices.shape[1])
            target.append(blocks[0].shape[1])
            for block in blocks:
                place += torch.bincount(block.flatten(), minlength=grid**2)
        contexts.append(torch.tensor(smallest).double())
        targets.append(torch.tensor(target).double())
        places.append(place / place.sum())
    # 40 batches each: four standard errors of the difference of two means
    for ours_, theirs_ in (contexts, targets):
        error = ((ours_.var() + theirs_.var()) / batches).sqrt()
        assert (ours_.mean() - theirs_.mean()).abs() <= 4 * error
    assert (places[0] - places[1]).abs().max() < 0.25 * places[1].max()
    assert torch.equal(places[0] == 0, places[1] == 0)  # neither reaches the last row and column


def test_a_context_touches_targets_only_where_it_must():
    """Targets of 3x3 and a context block of 4x4 on a 6x6 grid: often no place leaves more than ten patches of it."""
    torch.manual_seed(0)
    masks = BlockMasks(6, (0.5, 0.5), (0.25, 0.25), (1.0, 1.0), num_targets=2, min_keep=8)
    corners = torch.tensor([[top, left] for top in range(2) for left in range(2)])  # never the last row or column
    four = torch.full((4,), 4)
    blocks = rectangles(corners[:, 0], corners[:, 1], four, four, 6).flatten(1)
    touched = free = 0
    for _ in range(300):
        (context,), ((first, second),) = masks(1)
        assert len(context) > 8
        taken = torch.zeros(36, dtype=torch.bool)
        taken[torch.cat([first, second])] = True
        fits = (blocks & ~taken).sum(1) > 8
        if taken[context].any():
            touched += 1
            assert fits.sum() <= 1  # where one place of four fits, 20 draws miss it with probability 0.003
        else:
            free += 1
            assert fits.any()
    assert touched > 20 and free > 20


# -- iBOT --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [8, 16])
def test_ibots_masks_are_distributed_as_lightlys(grid):
    torch.manual_seed(0)
    random.seed(0)
    ours = torch.stack([random_block_masks(64, grid) for _ in range(30)])
    theirs = torch.stack([random_block_mask((64, grid, grid)) for _ in range(30)])
    assert ours.shape == theirs.shape and ours.dtype == torch.bool
    counts = [masks.flatten(2).sum(2) for masks in (ours, theirs)]
    assert all(((count > 0).sum(1) == 32).all() for count in counts)  # half of each batch
    sizes = [count[count > 0].double() for count in counts]
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.double)
    patches = grid**2
    assert ((sizes[0].quantile(quantiles) - sizes[1].quantile(quantiles)).abs() <= 0.02 * patches).all()
    assert sizes[0].max() <= patches / 2 and sizes[0].mean() == pytest.approx(sizes[1].mean().item(), rel=0.03)
    # how often a place is masked, and how much of a mask's outline is edge: many small blocks have more of it
    places = [masks.flatten(0, 1).double().mean(0) for masks in (ours, theirs)]
    assert (places[0] - places[1]).abs().max() < 0.05
    edges = [(masks[..., 1:] != masks[..., :-1]).double().sum() / masks.sum() for masks in (ours, theirs)]
    assert edges[0].item() == pytest.approx(edges[1].item(), rel=0.05)
    assert not torch.equal(ours[0], ours[1])


def test_masks_follow_torchs_generator():
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(random_block_masks(8, 8))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
