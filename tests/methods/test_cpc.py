"""CPC: what is predicted, what it is told from, and that it is the paper's loss."""

import math

import pytest
import torch
from torch import nn

from nepa_plugin.methods import CPC
from nepa_plugin.methods.cpc import Negatives, info_nce

SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def cpc(**kwargs):
    torch.manual_seed(0)
    args = {"backbone": "nepa_vit_tiny_patch14_224", "img_size": 16, "patch_size": 4, "backbone_args": SIZE}
    model = CPC(**(args | {"num_classes": 3, "horizon": 3, "num_negatives": 12} | kwargs))
    for block in model.backbone.blocks:  # so that what attention does shows in the outputs
        nn.init.ones_(block.gamma_1)
        nn.init.ones_(block.gamma_2)
    return model


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_the_loss_is_that_of_the_paper_written_out(images):
    model = cpc().eval()  # in training, positions are rescaled at random
    (drawn,) = model.masks(4)
    loss, features = model.step([images], [drawn])
    embeddings, outputs = model.backbone.predict_next(images)
    z, c = embeddings[:, 1:], outputs[:, 1:]
    matrices = model.predictors.weight.view(3, 32, 32)
    total = []
    for k in (1, 2, 3):
        terms = []
        for b in range(4):
            for t in range(16 - k):
                own = 16 * b + t + k
                others = [z.flatten(0, 1)[i] for i in drawn.tolist() if i != own]
                scores = torch.stack([z[b, t + k], *others]) @ (matrices[k - 1] @ c[b, t])
                terms.append(-scores.log_softmax(dim=0)[0])
        total.append(torch.stack(terms).mean())
    torch.testing.assert_close(loss, torch.stack(total).mean(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features, c.mean(dim=1))


def test_nothing_told_apart_costs_the_logarithm_of_the_choices():
    same = torch.zeros(5, 7, dtype=torch.bool)
    zeros = torch.zeros(5, 3), torch.zeros(5, 3), torch.zeros(7, 3)
    assert info_nce(*zeros, same).item() == pytest.approx(math.log(8))
    same[:, :6] = True  # which are the target itself
    assert info_nce(*zeros, same).item() == pytest.approx(math.log(2))


def test_gradients_reach_targets_and_negatives(images):
    """NEPA detaches its targets; contrast needs no such thing."""
    model = cpc()
    seen = []
    embed = model.backbone.predict_next
    model.backbone.predict_next = lambda x: seen.append(embed(x)) or seen[-1]
    loss, _ = model.step([images])
    (gradient,) = torch.autograd.grad(loss, seen[0][0], retain_graph=True)
    assert (gradient[:, 2:].abs().sum(dim=(0, 2)) > 0).all()


def test_predictions_do_not_see_what_they_predict(images):
    model = cpc().eval()
    other = images.clone()
    other[:, :, 8:] += 1.0  # the last two rows of patches
    with torch.no_grad():
        first, second = (model.predictors(model.backbone.predict_next(x)[1][:, 1:]) for x in (images, other))
    torch.testing.assert_close(first[:, :8], second[:, :8], rtol=0, atol=1e-6)
    assert (first[:, 8:] - second[:, 8:]).abs().max() > 0.01


def test_negatives_are_patches_of_the_whole_batch():
    torch.manual_seed(0)
    (drawn,) = Negatives(16, 4000)(8)
    assert drawn.shape == (4000,) and drawn.min() == 0 and drawn.max() == 16 * 8 - 1
    counts = drawn.bincount(minlength=128)
    assert counts.min() > 10 and counts.max() < 60  # 31 of each are expected


@pytest.mark.parametrize("horizon", [16, 20])
def test_more_steps_than_patches_are_refused(horizon):
    with pytest.raises(ValueError, match=f"horizon={horizon} must be less than the 16 patches"):
        cpc(horizon=horizon)


def test_another_backbone_is_refused():
    with pytest.raises(ValueError, match=r"CPC needs a nepa_vit_\* backbone"):
        cpc(backbone="plain_vit_tiny_patch14_224")
