"""Losses that make nothing wait are lightly's to the last few bits."""

import pytest
import torch
from lightly.loss import IBOTPatchLoss, NTXentLoss

from nepa_plugin.methods.losses import NTXent, PatchLoss
from nepa_plugin.methods.masks import PatchMasks


def value_and_gradients(loss, *inputs):
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    value = loss(*inputs)
    return value.detach(), *torch.autograd.grad(value, inputs)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_nt_xent(batch):
    torch.manual_seed(0)
    views = torch.randn(batch, 5), torch.randn(batch, 5)
    ours, theirs = (value_and_gradients(loss(temperature=0.2), *views) for loss in (NTXent, NTXentLoss))
    for mine, lightlys in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, lightlys, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_nt_xent_with_the_negatives_of_other_processes(rank, monkeypatch):
    torch.manual_seed(0)
    first, second = torch.randn(3, 4, 5), torch.randn(3, 4, 5)  # of three processes
    normalized = [torch.nn.functional.normalize(view, dim=-1) for view in (first, second)]
    monkeypatch.setattr("lightly.utils.dist.world_size", lambda: 3)
    monkeypatch.setattr("lightly.utils.dist.rank", lambda: rank)
    # each view is gathered once, by its own values
    monkeypatch.setattr("lightly.utils.dist.gather", lambda x: next(v for v in normalized if v[rank].equal(x)).unbind())
    ours, theirs = (
        loss(temperature=0.2, gather_distributed=True)(first[rank], second[rank]) for loss in (NTXent, NTXentLoss)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_loss_of_masked_patches():
    torch.manual_seed(0)
    masks, indices, weights = PatchMasks(4, 0.5, (0.25, 0.5), 2)(6)
    assert masks.shape == (12, 16) and torch.equal(indices, masks.flatten().nonzero()[:, 0])
    per_view = torch.zeros(12).index_add(0, indices // 16, weights)
    torch.testing.assert_close(per_view, masks.any(dim=1).float())  # a view counts once, however much of it is masked
    teacher, student = torch.randn(len(indices), 24), torch.randn(len(indices), 24)
    ours, theirs = PatchLoss(24), IBOTPatchLoss(24)
    for _ in range(2):  # the second time the center is no longer zero
        mine = value_and_gradients(lambda s: ours(teacher, s, weights / 12, 0.04), student)
        lightlys = value_and_gradients(lambda s: theirs(teacher, s, masks.view(12, 4, 4), teacher_temp=0.04), student)
        for one, other in zip(mine, lightlys, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.center.value, theirs.center.value)
