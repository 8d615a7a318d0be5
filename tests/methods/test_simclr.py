"""SimCLR: its loss."""

import math

import pytest
import torch
from torch import nn

from nepa_plugin.methods import SimCLR

SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def simclr(**kwargs):
    torch.manual_seed(0)
    args = {"backbone": "plain_vit_tiny_patch14_224", "img_size": 16, "patch_size": 4, "backbone_args": SIZE}
    return SimCLR(**(args | {"num_classes": 0, "hidden_dim": 16, "projection_dim": 8} | kwargs))


@pytest.fixture
def views():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 16, 16, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_loss_is_the_papers(views, temperature):
    """Equation 1: for each of the 2N projections, the other view of its image against all others but itself."""
    model = simclr(temperature=temperature)
    tokens = model.backbone.forward_features(torch.cat(views))
    z = nn.functional.normalize(model.projection_head(tokens[:, 0]), dim=1)
    similarity = (z @ z.T / temperature).tolist()
    total = 0.0
    for i in range(8):
        others = sum(math.exp(similarity[i][k]) for k in range(8) if k != i)
        total -= math.log(math.exp(similarity[i][(i + 4) % 8]) / others)
    assert model.step(views)[0].item() == pytest.approx(total / 8, rel=1e-5)


def test_equal_projections_cost_log_of_the_number_of_others(views):
    model = simclr()
    last = model.projection_head.layers[-1]  # BatchNorm
    nn.init.zeros_(last.weight)
    nn.init.ones_(last.bias)
    assert model.step(views)[0].item() == pytest.approx(math.log(7), rel=1e-5)


def test_batch_norm_sees_both_views(views):
    """The head's statistics are over 2N images, so moving one view's images changes the other's projections."""
    model = simclr()
    before = model.projection_head.layers[1].running_mean.clone()
    model.step(views)
    hidden = model.projection_head.layers[0](model.backbone.forward_features(torch.cat(views))[:, 0])
    expected = 0.9 * before + 0.1 * hidden.mean(0)
    torch.testing.assert_close(model.projection_head.layers[1].running_mean, expected)


def test_defaults_are_the_recipe():
    model = SimCLR(backbone="plain_vit_tiny_patch14_224", num_classes=0)
    assert (model.base_lr, model.weight_decay, model.ema_decay, model.clip_grad_norm) == (2e-4, 0.1, 0.0, 0.0)
    assert model.criterion.temperature == 0.1 and model.pool == "class"
    assert [m.out_features for m in model.projection_head.layers if isinstance(m, nn.Linear)] == [2048, 128]
