"""LeJEPA: its two terms, and its views."""

import math

import pytest
import torch
from torch import nn

from nepa_plugin.methods import LeJEPA

SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def lejepa(**kwargs):
    torch.manual_seed(0)
    args = {"backbone": "plain_vit_tiny_patch14_224", "img_size": 16, "patch_size": 4, "backbone_args": SIZE}
    heads = {"hidden_dim": 16, "projection_dim": 8, "num_vectors": 16, "num_local_crops": 2}
    return LeJEPA(**(args | heads | {"num_classes": 0, "drop_path_rate": 0.0} | kwargs))


@pytest.fixture
def views():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, size, size, generator=generator) for size in (16, 16, 8, 8)]


def projections(model, views):
    """The projections (V, B, D); BatchNorm sees all views at once."""
    features = torch.cat([model.backbone.forward_features(view)[:, 0] for view in views])
    return torch.stack(model.projection_head(features).split(len(views[0])))


def epps_pulley(values):
    """Distance of the empirical characteristic function of (N,) values from a Gaussian's, weighted by the latter."""
    n, (knots, t_max) = len(values), (17, 3.0)
    total, dt = 0.0, t_max / (knots - 1)
    for k in range(knots):
        t = k * dt
        cos = sum(math.cos(t * v) for v in values) / n
        sin = sum(math.sin(t * v) for v in values) / n
        gauss = math.exp(-t * t / 2)
        weight = dt * (1 if k in (0, knots - 1) else 2)  # trapezoids, for both signs of t
        total += weight * gauss * ((cos - gauss) ** 2 + sin**2)
    return n * total


@pytest.mark.parametrize("weight", [0.0, 0.05, 1.0])
def test_loss_is_the_papers(views, weight):
    model = lejepa(lambda_param=weight)
    z = projections(model, views).detach()
    center = (z[0] + z[1]) / 2
    agreement = sum((z[v] - center).square().mean().item() for v in range(4)) / 4
    torch.manual_seed(7)
    directions = nn.functional.normalize(torch.randn(8, 16), dim=0)  # what the loss draws
    gaussian = 0.0
    for v in range(4):
        for d in range(16):
            gaussian += epps_pulley((z[v] @ directions[:, d]).tolist()) / (4 * 16)
    torch.manual_seed(7)
    loss = model.step(views)[0].item()
    assert loss == pytest.approx(weight * gaussian + (1 - weight) * agreement, rel=1e-4)


def test_collapse_is_penalised_and_a_gaussian_is_not(views):
    model = lejepa(lambda_param=1.0)
    torch.manual_seed(0)
    gaussian = model.criterion(local_proj=torch.randn(1, 512, 8), global_proj=torch.randn(2, 512, 8))
    collapsed = model.criterion(local_proj=torch.zeros(1, 512, 8), global_proj=torch.zeros(2, 512, 8))
    assert gaussian < 1.5
    assert collapsed == pytest.approx(epps_pulley([0.0] * 512), rel=1e-4) and collapsed > 50 * gaussian


def test_gradients_flow_through_all_views(views):
    """Nothing is stopped: also the global views, the targets of the local ones, are drawn to these."""
    for source in range(4):
        model = lejepa(lambda_param=0.0)
        inputs = [view.clone().requires_grad_(v == source) for v, view in enumerate(views)]
        model.step(inputs)[0].backward()
        assert inputs[source].grad.abs().sum() > 0


def test_without_a_local_view_it_says_so():
    with pytest.raises(ValueError, match="num_local_crops=0: LeJEPA needs at least one local view"):
        lejepa(num_local_crops=0)


def test_defaults_are_the_recipe():
    model = LeJEPA(backbone="plain_vit_tiny_patch14_224", num_classes=0)
    assert (model.base_lr, model.min_lr, model.weight_decay, model.ema_decay) == (5e-4, 5e-7, 0.05, 0.0)
    assert (model.num_local_crops, model.local_crop_size) == (6, 98)
    assert (model.criterion.lambda_param, model.criterion.sigreg.num_vectors) == (0.05, 1024)
    assert [m.out_features for m in model.projection_head.layers if isinstance(m, nn.Linear)] == [2048, 2048, 64]


def test_global_and_local_views_differ_in_crop_only():
    steps = [view.transform.transforms for view in lejepa().train_transform().transforms]
    assert [view[0].size[0] for view in steps] == [16, 16, 8, 8]
    assert [view[0].scale for view in steps] == [(0.3, 1.0)] * 2 + [(0.05, 0.3)] * 2
    of = lambda view, name: next(step for step in view if type(step).__name__ == name)  # noqa: E731
    assert [of(view, "RandomSolarization").prob for view in steps] == [0.2] * 4
    assert [of(view, "GaussianBlur").prob for view in steps] == [0.5] * 4
    assert [of(view, "RandomGrayscale").p for view in steps] == [0.2] * 4
    jitter = [of(view, "RandomApply").transforms[0] for view in steps]
    assert all(j.brightness == pytest.approx((0.6, 1.4)) and j.saturation == pytest.approx((0.8, 1.2)) for j in jitter)
