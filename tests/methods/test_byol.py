"""BYOL: its loss, its target network."""

import pytest
import torch
from torch import nn

from nepa_plugin.methods import BYOL

SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def byol(**kwargs):
    torch.manual_seed(0)
    args = {"backbone": "plain_vit_tiny_patch14_224", "img_size": 16, "patch_size": 4, "backbone_args": SIZE}
    return BYOL(**(args | {"num_classes": 0, "hidden_dim": 16, "projection_dim": 8} | kwargs))


@pytest.fixture
def views():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 16, 16, generator=generator) for _ in range(2)]


def test_loss_is_the_papers(views):
    """Equation 2 of both assignments, the squared distance of unit vectors, is 4 times this loss plus 4."""
    model = byol()
    with torch.no_grad():
        for _, target in model.momentum_pairs():  # so that the two networks cannot be mixed up
            for parameter in target.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        q = [model.prediction_head(model.projection_head(model.backbone.forward_features(v)[:, 0])) for v in views]
        z = [model.teacher_projection_head(model.teacher_backbone.forward_features(v)[:, 0]) for v in views]
    paper = 0.0
    for a, b in ((q[0], z[1]), (q[1], z[0])):
        for i in range(4):
            paper += (a[i] / a[i].norm() - b[i] / b[i].norm()).square().sum().item() / 4
    assert 4 * model.step(views)[0].item() + 4 == pytest.approx(paper, rel=1e-4)


def test_predictions_equal_to_the_targets_cost_minus_one(views):
    model = byol()
    model.prediction_head = nn.Identity()  # the target network starts equal to the online one
    assert model.step([views[0], views[0]])[0].item() == pytest.approx(-1, abs=1e-6)


def test_no_gradient_flows_through_the_targets(views):
    """With predictions that do not depend on the image, only the targets could carry a gradient."""
    model = byol()
    nn.init.zeros_(model.prediction_head.layers[-1].weight)
    nn.init.normal_(model.prediction_head.layers[-1].bias)
    model.step(views)[0].backward()
    reached = [*model.backbone.parameters(), *model.projection_head.parameters()]
    assert all(p.grad is None or not p.grad.any() for p in reached)
    assert model.prediction_head.layers[-1].bias.grad.any()


def test_defaults_are_the_recipe():
    model = BYOL(backbone="plain_vit_tiny_patch14_224", num_classes=0)
    widths = lambda head: [m.out_features for m in head.layers if isinstance(m, nn.Linear)]  # noqa: E731
    assert widths(model.projection_head) == [4096, 256] and widths(model.prediction_head) == [4096, 256]
    assert (model.base_lr, model.weight_decay, model.momentum, model.final_momentum) == (1e-4, 0.03, 0.996, 1.0)


def test_the_predictor_has_no_momentum_copy():
    model = byol()
    students = [student for student, _ in model.momentum_pairs()]
    assert students[0] is model.backbone and students[1] is model.projection_head and len(students) == 2
