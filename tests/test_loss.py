import math

import pytest
import torch
from conftest import TOY
from lightly.loss import NTXentLoss
from torch.nn import functional as F

import nepa_plugin
from nepa_plugin import NextEmbeddingLoss
from nepa_plugin.checkpoints.published import state_from_nepa
from nepa_plugin.loss import ContrastiveNextEmbeddingLoss


def test_parity_of_loss_and_every_gradient(toy, expected):
    loss = NextEmbeddingLoss()(*toy.predict_next(expected["pixel_values"]))
    assert abs(loss.item() - expected["loss"].item()) <= 1e-6
    loss.backward()
    published = {k.removeprefix("grad."): v for k, v in expected.items() if k.startswith("grad.")}
    reference, _ = state_from_nepa(published, depth=3, gated=False)
    parameters = dict(toy.named_parameters())
    assert reference.keys() == parameters.keys()
    for name, gradient in reference.items():
        scale = gradient.abs().max().clamp_min(1e-12)
        assert ((parameters[name].grad - gradient).abs().max() / scale).item() <= 1e-5, name


def test_parity_of_ten_adamw_steps(expected):
    model = nepa_plugin.load_backbone(TOY, rope_rescale_coords=1.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for _ in range(10):
        loss = NextEmbeddingLoss()(*model.predict_next(expected["pixel_values"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(expected["loss_trajectory"].tolist(), abs=1e-4)


def test_is_the_mean_negative_cosine():
    z, p = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    reference = -F.cosine_similarity(p[:, :-1], z[:, 1:], dim=-1).mean()
    assert NextEmbeddingLoss()(z, p).item() == pytest.approx(reference.item(), abs=1e-6)
    assert NextEmbeddingLoss()(z, torch.roll(z, -1, 1)).item() == pytest.approx(-1, abs=1e-6)


def test_without_shift_copying_is_perfect():
    z = torch.randn(3, 5, 8)
    assert NextEmbeddingLoss(shift=False)(z, z).item() == pytest.approx(-1, abs=1e-6)
    assert NextEmbeddingLoss()(z, z).item() > -0.9


@pytest.mark.parametrize("stop", [True, False])
def test_stop_gradient(stop):
    z, p = torch.randn(2, 4, 8, requires_grad=True), torch.randn(2, 4, 8, requires_grad=True)
    NextEmbeddingLoss(stop_gradient=stop)(z, p).backward()
    assert (z.grad is None) is stop
    assert p.grad[:, :-1].abs().min() > 0 and p.grad[:, -1].abs().max() == 0


def test_float32_under_autocast_and_for_bfloat16():
    z, p = torch.randn(2, 4, 8).bfloat16(), torch.randn(2, 4, 8).bfloat16()
    reference = NextEmbeddingLoss()(z.float(), p.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = NextEmbeddingLoss()(z, p)
    assert loss.dtype == torch.float32 and torch.equal(loss, reference)


def test_zero_vectors_are_finite():
    p = torch.zeros(1, 3, 4, requires_grad=True)
    loss = NextEmbeddingLoss()(torch.zeros(1, 3, 4), p)
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(p.grad).all()


def test_bad_shapes():
    with pytest.raises(ValueError, match="one shape"):
        NextEmbeddingLoss()(torch.zeros(1, 3, 4), torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="at least 2 tokens"):
        NextEmbeddingLoss()(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4))


@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_ahead_compares_with_the_embedding_so_many_places_on(ahead):
    z, p = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    reference = -F.cosine_similarity(p[:, :-ahead], z[:, ahead:], dim=-1).mean()
    assert NextEmbeddingLoss()(z, p, ahead=ahead).item() == pytest.approx(reference.item(), abs=1e-6)
    with pytest.raises(ValueError, match="looks 5 ahead needs at least 6 tokens"):
        NextEmbeddingLoss()(z, p, ahead=5)


def valid_of(lengths, tokens):
    return torch.arange(tokens) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("loss", [NextEmbeddingLoss(), ContrastiveNextEmbeddingLoss(temperature=0.5)])
def test_what_is_not_valid_has_no_part(loss):
    z, p, lengths = torch.randn(3, 6, 8), torch.randn(3, 6, 8, requires_grad=True), [6, 3, 4]
    valid = valid_of(lengths, 6)
    assert loss(z, p, torch.ones_like(valid)).item() == pytest.approx(loss(z, p).item(), abs=1e-6)
    alone = [loss(z[i : i + 1, :n], p[i : i + 1, :n]) * (n - 1) for i, n in enumerate(lengths)]
    value = loss(z, p, valid)
    assert value.item() == pytest.approx((sum(alone) / 10).item(), abs=1e-6)
    (gradient,) = torch.autograd.grad(value, p)
    garbage = loss(z.masked_fill(~valid[..., None], 1e30), p, valid)
    assert torch.equal(garbage, value) and torch.equal(torch.autograd.grad(garbage, p)[0], gradient)
    with pytest.raises(ValueError, match=r"Expected valid \(3, 6\), got \(3, 5\)"):
        loss(z, p, valid[:, 1:])


@pytest.mark.parametrize("ahead", [1, 3])
def test_contrast_is_the_cross_entropy_among_the_patches_of_the_image(ahead):
    z, p = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    terms = []
    for b in range(2):
        targets = z[b, ahead:]
        for t in range(6 - ahead):
            scores = torch.stack([F.cosine_similarity(p[b, t], other, dim=0) for other in targets]) / 0.2
            terms.append(F.cross_entropy(scores[None], torch.tensor([t])))
    value = ContrastiveNextEmbeddingLoss(temperature=0.2)(z, p, ahead=ahead)
    assert value.item() == pytest.approx(torch.stack(terms).mean().item(), abs=1e-5)


def test_contrast_is_lightlys_with_the_other_patches_in_its_memory():
    z, p = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    terms = []
    for b in range(2):
        for t in range(5):
            theirs = NTXentLoss(temperature=0.2, memory_bank_size=(4, 8))
            theirs.memory_bank.bank = F.normalize(torch.cat([z[b, 1 : t + 1], z[b, t + 2 :]]), dim=1)
            terms.append(theirs(p[b, t][None], z[b, t + 1][None]))
    assert ContrastiveNextEmbeddingLoss(temperature=0.2)(z, p).item() == pytest.approx(
        torch.stack(terms).mean().item(), abs=1e-5
    )


def test_contrast_is_not_met_by_what_all_patches_share():
    """Embeddings around one large mean: a copy of the mean has a cosine near 1, and tells no patch from another."""
    z = torch.randn(4, 17, 8) * 0.1 + 3.0
    mean = z.mean(dim=(0, 1)).expand_as(z)
    assert NextEmbeddingLoss()(z, mean).item() < -0.99
    contrast = ContrastiveNextEmbeddingLoss()
    assert contrast(z, mean).item() == pytest.approx(math.log(16), abs=0.05)
    assert contrast(z, torch.roll(z - mean, -1, 1)).item() < contrast(z, mean).item() - 0.05
    with pytest.raises(ValueError, match="temperature=0 must be positive"):
        ContrastiveNextEmbeddingLoss(temperature=0)
