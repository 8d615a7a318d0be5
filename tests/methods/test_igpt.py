"""iGPT: which pixels are predicted, by which token, and as which colours."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nepa_plugin.methods import IGPT

SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def igpt(**kwargs):
    torch.manual_seed(0)
    args = {"backbone": "nepa_vit_tiny_patch14_224", "img_size": 16, "patch_size": 4, "backbone_args": SIZE}
    return IGPT(**(args | {"num_classes": 3, "codebook_size": 9} | kwargs))


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pixels", [1, 2, 4])
def test_each_patch_has_the_mean_colours_of_its_cells(pixels, images):
    cells = igpt(pixels=pixels).vectors(images)
    assert cells.shape == (2, 16, pixels**2, 3)
    side = 4 // pixels
    for patch, cell in ((0, 0), (6, pixels**2 - 1), (15, 0)):
        top, left = 4 * (patch // 4) + side * (cell // pixels), 4 * (patch % 4) + side * (cell % pixels)
        mean = images[:, :, top : top + side, left : left + side].mean(dim=(2, 3))
        torch.testing.assert_close(cells[:, patch, cell], mean)


def test_the_loss_is_the_next_patchs_cross_entropy_written_out(images):
    model = igpt().eval()
    nn.init.normal_(model.head.weight)
    loss, features = model.step([images])
    _, outputs = model.backbone.predict_next(images)
    ids = model.codebook(model.vectors(images))
    terms = []
    for b in range(2):
        for patch in range(16):
            logits = model.head(outputs[b, patch]).view(4, 9)  # token 0 is the class token, before patch 0
            terms += [F.cross_entropy(logits[cell][None], ids[b, patch, cell][None]) for cell in range(4)]
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    torch.testing.assert_close(features, outputs[:, 1:].mean(dim=1))


def test_it_starts_with_every_colour_alike(images):
    assert igpt().step([images])[0].item() == pytest.approx(math.log(9))


def test_a_sequence_of_two_colours_is_learned():
    """Columns of black and white patches in turn: with what came before, every colour is certain but the first."""
    model = igpt(codebook_size=2, pixels=1)
    model.codebook.centers.copy_(torch.tensor([[-1.0] * 3, [1.0] * 3]))
    stripes = (torch.arange(16) // 4 % 2 * 2.0 - 1).expand(8, 3, 16, 16).clone()
    stripes[::2] *= -1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model.step([stripes])[0]
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(math.log(2) / 16, abs=0.02)  # the first patch stays a guess


@pytest.mark.parametrize("pixels", [3, 8])
def test_pixels_must_divide_the_patches(pixels):
    with pytest.raises(ValueError, match=f"pixels={pixels} must divide the patches' sides, 4x4"):
        igpt(pixels=pixels)
