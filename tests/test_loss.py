import pytest
import torch
from conftest import TOY
from torch.nn import functional as F

import nepa_plugin
from nepa_plugin import NextEmbeddingLoss
from nepa_plugin.checkpoints.published import state_from_nepa


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
    with pytest.raises(ValueError, match="at least two tokens"):
        NextEmbeddingLoss()(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4))
