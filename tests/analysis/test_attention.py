"""Attention probabilities against the published implementation's, and what is counted in them."""

import math
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import nepa_plugin
from nepa_plugin.analysis.attention import (
    attention_probabilities,
    attention_statistics,
    rollout,
    uniform_statistics,
)
from nepa_plugin.order import patch_order

TOY = Path(__file__).parents[1] / "data" / "nepa-toy-gelu"


def build(**kwargs):
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "init_values": 1.0}
    return timm.create_model("nepa_vit_tiny_patch14_224", **(sizes | kwargs)).eval()


def test_probabilities_are_the_published_ones():
    expected = load_file(TOY / "expected.safetensors")
    model = nepa_plugin.load_backbone(TOY).train()
    found = attention_probabilities(model, expected["pixel_values"])
    assert list(found) == [1, 2, 3]
    for layer, probabilities in found.items():
        torch.testing.assert_close(probabilities, expected[f"attentions.{layer - 1}"], rtol=0, atol=1e-5)
    assert model.training  # as it was


def test_only_the_layers_asked_for_make_a_matrix():
    model, seen = build(), []
    for block in model.blocks:
        block.attn.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    found = attention_probabilities(model, torch.randn(1, 3, 16, 16), [2])
    assert list(found) == [2] and seen == [(1, 2, 17, 17)]
    assert all(block.attn.fused_attn for block in model.blocks)
    with pytest.raises(ValueError, match=r"Layers \[0, 4\] are not in 1..3"):
        attention_probabilities(model, torch.randn(1, 3, 16, 16), [0, 2, 4])
    assert all(block.attn.fused_attn and not block.attn._forward_hooks for block in model.blocks)


@pytest.mark.parametrize("order", ["raster", "hilbert", "spiral_in"])
def test_rows_are_distributions_over_what_is_read_no_later(order):
    model = build(order=order)
    read = patch_order(order, 4, 4)
    probabilities = attention_probabilities(model, torch.randn(2, 3, 16, 16))[3]
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(2, 2, 17))
    for k, patch in enumerate(read):
        zero = probabilities[:, :, 1 + patch] == 0
        assert {i for i in range(16) if zero[0, 0, 1 + i]} == set(read[k + 1 :])


def test_a_plain_vit_has_attention_too():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0)
    assert attention_probabilities(model, torch.randn(1, 3, 32, 32))[2].shape == (1, 3, 5, 5)


def test_rollout_follows_the_layers():
    first, second = torch.rand(2, 1, 3, 5, 5).softmax(dim=-1)
    halves = [(layer.mean(dim=1) + torch.eye(5)) / 2 for layer in (first, second)]
    torch.testing.assert_close(rollout([first, second]), halves[1] @ halves[0])
    torch.testing.assert_close(rollout([first, second]).sum(dim=-1), torch.ones(1, 5))


def test_statistics_written_out():
    rows, columns, prefix = 3, 4, 1
    probabilities = torch.rand(2, 3, 13, 13, generator=torch.Generator().manual_seed(0)).mul(4).softmax(dim=-1)
    found = attention_statistics(probabilities, (rows, columns), prefix)
    for head in range(3):
        distance, entropy, outside = [], [], []
        for image in probabilities[:, head]:
            for q in range(12):
                row = image[prefix + q]
                entropy.append(-sum(float(p) * math.log(float(p)) for p in row))
                weights = row[prefix:] / row[prefix:].sum()
                apart = [(q // columns - k // columns, q % columns - k % columns) for k in range(12)]
                distance.append(sum(float(w) * math.hypot(*d) for w, d in zip(weights, apart, strict=True)))
                far = [max(abs(a), abs(b)) > 1 for a, b in apart]
                outside.append(sum(float(w) for w, f in zip(weights, far, strict=True) if f))
        for values, wanted in ((found.distance, distance), (found.entropy, entropy), (found.outside, outside)):
            assert float(values[head]) == pytest.approx(sum(wanted) / len(wanted), abs=1e-5)


def test_attention_to_oneself_is_no_distance_away():
    found = attention_statistics(torch.eye(10)[None, None], (3, 3), 1)
    assert [float(value) for value in vars(found).values()] == [0, 0, 0]


def test_uniform_attention():
    assert uniform_statistics((2, 2), 1, None)["entropy"] == pytest.approx(math.log(5))
    causal = uniform_statistics((2, 2), 1, (0, 1, 2, 3))
    assert causal["entropy"] == pytest.approx(sum(map(math.log, (2, 3, 4, 5))) / 4)
    assert causal["outside"] == 0
    assert uniform_statistics((2, 2), 1, (3, 2, 1, 0)) == pytest.approx(causal)
