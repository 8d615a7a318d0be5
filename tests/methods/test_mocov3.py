"""MoCo v3: its loss, its keys, its momentum encoder."""

import math

import pytest
import torch
from torch import nn

from nepa_plugin.methods import MoCoV3, mocov3

SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def moco(**kwargs):
    torch.manual_seed(0)
    args = {"backbone": "plain_vit_tiny_patch14_224", "img_size": 16, "patch_size": 4, "backbone_args": SIZE}
    return MoCoV3(**(args | {"num_classes": 0, "hidden_dim": 16, "projection_dim": 8} | kwargs))


@pytest.fixture
def views():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 16, 16, generator=generator) for _ in range(2)]


def info_nce(queries, keys, temperature, offset=0):
    """Algorithm 1's ctr: each query's key against all keys, times twice the temperature."""
    q, k = nn.functional.normalize(queries, dim=1), nn.functional.normalize(keys, dim=1)
    total = 0.0
    for i, row in enumerate((q @ k.T / temperature).tolist()):
        total -= math.log(math.exp(row[i + offset]) / sum(map(math.exp, row)))
    return 2 * temperature * total / len(q)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_loss_is_symmetric_info_nce(views, temperature):
    model = moco(temperature=temperature)
    with torch.no_grad():
        for _, teacher in model.momentum_pairs():  # so that queries' and keys' encoders cannot be mixed up
            for parameter in teacher.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        q = [model.prediction_head(model.projection_head(model.backbone.forward_features(v)[:, 0])) for v in views]
        k = [model.teacher_projection_head(model.teacher_backbone.forward_features(v)[:, 0]) for v in views]
    expected = info_nce(q[0], k[1], temperature) + info_nce(q[1], k[0], temperature)
    assert model.step(views)[0].item() == pytest.approx(expected, rel=1e-4)
    assert model.step([views[1], views[0]])[0].item() == pytest.approx(expected, rel=1e-4)


def test_equal_keys_cost_log_n():
    model = moco(temperature=0.2)
    loss = model.contrast(torch.randn(5, 8), torch.ones(5, 8))
    assert loss.item() == pytest.approx(0.4 * math.log(5), rel=1e-5)


def test_perfect_predictions_cost_nothing_but_the_other_keys():
    keys = torch.eye(4)
    expected = 0.4 * math.log(1 + 3 * math.exp(-5))  # cosine 1 with the own key, 0 with three others, over 0.2
    assert moco().contrast(3 * keys, 7 * keys).item() == pytest.approx(expected, rel=1e-5)


def test_keys_come_from_all_devices(monkeypatch):
    torch.manual_seed(2)
    queries, own, other = torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 8)
    monkeypatch.setattr(mocov3.dist, "world_size", lambda: 2)
    monkeypatch.setattr(mocov3.dist, "rank", lambda: 1)
    monkeypatch.setattr(mocov3.dist, "gather", lambda keys: (nn.functional.normalize(other, dim=1), keys))
    loss = moco().contrast(queries, own)
    assert loss.item() == pytest.approx(info_nce(queries, torch.cat([other, own]), 0.2, offset=3), rel=1e-5)


def test_heads_are_the_papers():
    model = MoCoV3(backbone="plain_vit_tiny_patch14_224", num_classes=0)
    widths = lambda head: [m.out_features for m in head.layers if isinstance(m, nn.Linear)]  # noqa: E731
    assert widths(model.projection_head) == [4096, 4096, 256] and widths(model.prediction_head) == [4096, 256]
    for head in (model.projection_head, model.prediction_head):
        assert sum(isinstance(m, nn.BatchNorm1d) for m in head.layers) == len(widths(head))  # after every layer
    assert (model.base_lr, model.weight_decay, model.momentum, model.final_momentum) == (1.5e-4, 0.1, 0.99, 1.0)


def test_the_predictor_has_no_momentum_copy():
    students = [student for student, _ in moco().momentum_pairs()]
    assert len(students) == 2 and isinstance(students[1], type(moco().projection_head))


def test_a_temperature_must_be_positive():
    with pytest.raises(ValueError, match=r"temperature must be greater than 0, got 0\.0"):
        moco(temperature=0.0)
