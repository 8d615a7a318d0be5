"""Batched resizing against torchvision's, a crop at a time."""

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

import nepa_plugin.data.resample
from nepa_plugin.data.resample import resampling_matrices, resize_crops

MODES = [InterpolationMode.BILINEAR, InterpolationMode.BICUBIC]


def some_crops(sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8) for h, w in sizes]


def expected(crops, flips, size, interpolation):
    resized = [F.resize(c.float(), list(size), interpolation, antialias=True).clamp(0, 255) for c in crops]
    return torch.stack([r.flip(-1) if flip else r for r, flip in zip(resized, flips, strict=True)])


@pytest.mark.parametrize("interpolation", MODES)
def test_resized_crops_are_torchvisions(interpolation):
    """Noise, enlarged and reduced, down to a single pixel; up to the rounding of the filter's positions."""
    sizes = [(1, 1), (1, 90), (7, 3), (24, 40), (25, 39), (100, 13), (333, 217), (480, 470)]
    flips = torch.tensor([False, True] * 4)
    crops = some_crops(sizes)
    resized = resize_crops(crops, flips, (24, 40), interpolation)
    assert resized.shape == (8, 3, 24, 40) and resized.dtype == torch.float32
    assert (resized - expected(crops, flips, (24, 40), interpolation)).abs().max() < 2e-3  # of 255 levels
    assert torch.equal(resized[3], crops[3].float().flip(-1))  # the same size: nothing changes but the flip


@pytest.mark.parametrize("interpolation", MODES)
def test_a_batch_of_channels_last_views(interpolation):
    pixels = torch.randint(0, 256, (60, 70, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    crops = [pixels.permute(2, 0, 1)[:, 5:50, 8:61], pixels.permute(2, 0, 1)[:, :, 3:]]
    flips = torch.tensor([True, False])
    difference = resize_crops(crops, flips, (16, 16), interpolation) - expected(crops, flips, (16, 16), interpolation)
    assert difference.abs().max() < 2e-3


def test_large_images_are_resized_in_small_groups(monkeypatch):
    crops = some_crops([(30, 40), (200, 300), (20, 20), (31, 38), (150, 310)])
    flips = torch.tensor([True, False, True, False, False])
    whole = resize_crops(crops, flips, (16, 16), InterpolationMode.BILINEAR)
    monkeypatch.setattr(nepa_plugin.data.resample, "GROUP_PIXELS", 31 * 40 * 3)
    groups = nepa_plugin.data.resample._groups(sorted(crops, key=lambda crop: crop[0].numel()))
    assert [len(group) for group in groups] == [3, 1, 1]
    assert (resize_crops(crops, flips, (16, 16), InterpolationMode.BILINEAR) - whole).abs().max() < 1e-3


@pytest.mark.parametrize("interpolation", MODES)
def test_weights_sum_to_one_and_none_is_on_the_padding(interpolation):
    lengths = torch.tensor([5, 40, 64])
    matrices = resampling_matrices(lengths, 64, 16, interpolation)
    assert matrices.shape == (3, 16, 64)
    assert torch.allclose(matrices.sum(-1), torch.ones(3, 16), atol=1e-6)
    for matrix, length in zip(matrices, lengths.tolist(), strict=True):
        assert matrix[:, length:].abs().sum() == 0 and matrix[:, length - 1].abs().sum() > 0
    mirrored = resampling_matrices(lengths, 64, 16, interpolation, torch.tensor([True, False, True]))
    assert torch.equal(mirrored[0], matrices[0].flip(0)) and torch.equal(mirrored[1], matrices[1])
