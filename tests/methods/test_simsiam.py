"""SimSiam: its loss and its stopped gradient."""

import pytest
import torch
from torch import nn

from nepa_plugin.methods import SimSiam

SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def simsiam(**kwargs):
    torch.manual_seed(0)
    args = {"backbone": "plain_vit_tiny_patch14_224", "img_size": 16, "patch_size": 4, "backbone_args": SIZE}
    heads = {"hidden_dim": 16, "projection_dim": 8, "prediction_hidden_dim": 4}
    return SimSiam(**(args | heads | {"num_classes": 0} | kwargs))


@pytest.fixture
def views():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 16, 16, generator=generator) for _ in range(2)]


def test_loss_is_the_papers(views):
    """Equation 2: half of the negative cosines of each prediction and the other view's projection."""
    model = simsiam()
    z = [model.projection_head(model.backbone.forward_features(view)[:, 0]) for view in views]
    p = [model.prediction_head(projection) for projection in z]
    expected = 0.0
    for a, b in ((p[0], z[1]), (p[1], z[0])):
        for i in range(4):
            expected -= (a[i] @ b[i] / (a[i].norm() * b[i].norm())).item() / 4 / 2
    assert model.step(views)[0].item() == pytest.approx(expected, rel=1e-4)


def test_predictions_equal_to_the_projections_cost_minus_one(views):
    model = simsiam()
    model.prediction_head = nn.Identity()
    assert model.step([views[0], views[0]])[0].item() == pytest.approx(-1, abs=1e-6)


def test_no_gradient_flows_through_the_targets(views):
    """With predictions that do not depend on the image, only the targets could carry a gradient to the backbone."""
    model = simsiam()
    nn.init.zeros_(model.prediction_head.layers[-1].weight)
    nn.init.normal_(model.prediction_head.layers[-1].bias)
    model.step(views)[0].backward()
    reached = [*model.backbone.parameters(), *model.projection_head.parameters()]
    assert all(p.grad is None or not p.grad.any() for p in reached)
    assert model.prediction_head.layers[-1].bias.grad.any()


def test_heads_are_the_papers():
    model = SimSiam(backbone="plain_vit_tiny_patch14_224", num_classes=0)
    widths = lambda head: [m.out_features for m in head.layers if isinstance(m, nn.Linear)]  # noqa: E731
    assert widths(model.projection_head) == [2048] * 3 and widths(model.prediction_head) == [512, 2048]
    assert (model.base_lr, model.weight_decay, model.ema_decay) == (1.5e-4, 0.1, 0.0)
