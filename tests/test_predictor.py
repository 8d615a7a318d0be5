import copy
import math

import pytest
import timm
import torch
from conftest import TOY_CLASSIFIER
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import nepa_plugin
from nepa_plugin import NepaViT, NextEmbeddingLoss

SIZES = ("tiny", "small", "base", "large", "huge")


def near(a, b, tolerance):
    return (a - b).abs().max().item() <= tolerance


def test_parity_of_every_hidden_state(toy, expected):
    images = expected["pixel_values"]
    embeddings, predictions = toy.predict_next(images)
    assert near(embeddings, expected["input_embedding"], 1e-5)
    assert near(embeddings, expected["hidden_states.0"], 1e-5)
    final, blocks = toy.forward_intermediates(images, output_fmt="NLC", return_prefix_tokens=True)
    for i, (patches, prefix) in enumerate(blocks[:-1]):
        assert near(torch.cat([prefix, patches], 1), expected[f"hidden_states.{i + 1}"], 1e-5)
    for output in (predictions, final, toy.forward_features(images), toy(images)):
        assert near(output, expected["hidden_states.3"], 1e-5)
    assert near(predictions, expected["last_hidden_state"], 1e-5)


def test_parity_of_attention_probabilities(toy, expected):
    seen = []
    for block in toy.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output))
    toy(expected["pixel_values"])
    assert len(seen) == 3
    for i, probabilities in enumerate(seen):
        assert near(probabilities, expected[f"attentions.{i}"], 1e-5)


def test_parity_bidirectional(toy, expected):
    toy.set_attention("bidirectional")
    assert near(toy(expected["pixel_values"]), expected["last_hidden_state_bidirectional"], 1e-5)


def test_parity_of_the_classifier():
    expected, model = load_file(TOY_CLASSIFIER / "expected.safetensors"), nepa_plugin.load_backbone(TOY_CLASSIFIER)
    assert near(model(expected["pixel_values"]), expected["logits_causal"], 1e-5)
    model.set_attention("bidirectional")
    assert near(model(expected["pixel_values"]), expected["logits_bidirectional"], 1e-5)


@pytest.mark.parametrize("patch", [0, 5, 15])
def test_a_patch_changes_no_earlier_prediction(small, patch):
    torch.nn.init.normal_(small.blocks[0].gamma_1)  # LayerScale starts so small that attention hardly shows
    images = torch.randn(2, 3, 16, 16)
    changed = images.clone()
    row, column = divmod(patch, 4)
    changed[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
    small.eval()
    difference = (small(changed) - small(images)).abs().amax(dim=(0, 2))
    token = patch + 1  # the class token is first
    assert difference[:token].max() == 0 if token else True
    assert difference[token:].min() > 1e-6
    small.set_attention("bidirectional")
    difference = (small(changed) - small(images)).abs().amax(dim=(0, 2))
    assert difference.min() > 1e-6


def test_unknown_attention_mode(small):
    with pytest.raises(ValueError, match="'masked' is not one of"):
        small.set_attention("masked")
    with pytest.raises(ValueError, match="is not one of"):
        NepaViT(img_size=16, patch_size=4, attention="full")


def test_registered_names_and_sizes():
    names = {f"nepa_vit_{size}_patch14{mlp}_224" for size in SIZES for mlp in ("", "_swiglu")}
    assert set(timm.list_models("nepa_vit*")) == names
    with torch.device("meta"):
        base, gated = (timm.create_model(f"nepa_vit_base_patch14{mlp}_224") for mlp in ("", "_swiglu"))
    count = [sum(p.numel() for p in m.parameters()) for m in (base, gated)]
    assert count == [85_527_552, 85_539_840]
    assert (len(base.blocks), base.embed_dim, base.blocks[0].attn.num_heads) == (12, 768, 12)


@pytest.mark.parametrize("size", SIZES)
def test_every_name_builds(size):
    for mlp in ("", "_swiglu"):
        model = timm.create_model(f"nepa_vit_{size}_patch14{mlp}_224", depth=1, img_size=28)
        assert model(torch.randn(1, 3, 28, 28)).shape == (1, 5, model.embed_dim)


def test_timm_arguments():
    model = timm.create_model(
        "nepa_vit_tiny_patch14_224", depth=3, img_size=(8, 24), patch_size=4, in_chans=1, drop_path_rate=0.2
    )
    assert model.blocks[2].drop_path1.drop_prob == pytest.approx(0.2)
    assert model(torch.randn(2, 1, 8, 24)).shape == (2, 13, 192)
    dynamic = timm.create_model("nepa_vit_tiny_patch14_224", depth=2, dynamic_img_size=True)
    assert dynamic(torch.randn(1, 3, 28, 56)).shape == (1, 9, 192)
    features = timm.create_model(
        "nepa_vit_tiny_patch14_224", depth=4, img_size=28, features_only=True, out_indices=(1, 3)
    )
    images, wrapped = torch.randn(1, 3, 28, 28), features.eval().model
    outputs = features(images)
    assert [tuple(f.shape) for f in outputs] == [(1, 192, 2, 2)] * 2
    reference = wrapped.forward_intermediates(images, indices=[1, 3], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(outputs, reference, strict=True))
    model.set_input_size(img_size=(16, 16))
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 17, 192)


def test_dynamic_size_equals_fixed_size(small):
    dynamic = NepaViT(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, dynamic_img_size=True)
    dynamic.load_state_dict(small.state_dict())
    images = torch.randn(2, 3, 16, 16)
    assert near(dynamic.eval()(images), small.eval()(images), 1e-6)


def test_intermediate_layers(small):
    images = torch.randn(2, 3, 16, 16)
    small.eval()
    maps = small.forward_intermediates(images, indices=[0, 1], intermediates_only=True)
    assert torch.equal(small.get_intermediate_layers(images, n=2, reshape=True)[1], maps[1])
    (tokens,) = small.get_intermediate_layers(images, n=[0])
    assert torch.equal(tokens, maps[0].flatten(2).mT)
    ((patches, prefix),) = small.get_intermediate_layers(images, n=1, return_prefix_tokens=True, norm=True)
    assert near(torch.cat([prefix, patches], 1), small(images), 1e-6)


def test_gradient_checkpointing_gives_the_same_gradients(small):
    images, gradients, calls = torch.randn(2, 3, 16, 16), [], []
    small.blocks[0].register_forward_pre_hook(lambda *args: calls.append(small.grad_checkpointing))
    for enable in (False, True):
        small.set_grad_checkpointing(enable)
        small.zero_grad()
        torch.manual_seed(1)
        NextEmbeddingLoss()(*small.train().predict_next(images)).backward()
        gradients.append([p.grad.clone() for p in small.parameters()])
    assert calls == [False, True, True]  # the block runs again in the backward pass
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))


def test_sizes_that_do_not_fit(small):
    with pytest.raises(ValueError, match=r"\(30, 30\) is not divisible by patch size \(4, 4\).*\(32, 32\)"):
        NepaViT(img_size=30, patch_size=4)
    with pytest.raises(ValueError, match="built for images of"):
        small(torch.randn(1, 3, 20, 20))
    with pytest.raises(ValueError, match="shape"):
        small(torch.randn(1, 1, 16, 16))
    with pytest.raises(ValueError, match="multiple of 4 x num_heads"):
        NepaViT(img_size=16, patch_size=4, embed_dim=36, num_heads=2)
    with pytest.raises(ValueError, match="not divisible"):
        small.set_input_size(img_size=18)


@pytest.mark.parametrize("option", ["dynamic_img_pad", "dynamic_img_resize"])
def test_padding_or_resizing_if_asked_for(option):
    model = NepaViT(img_size=18, patch_size=4, embed_dim=32, depth=1, num_heads=2, **{option: True}).eval()
    images = torch.randn(1, 3, 18, 21)
    (feature_map,) = model.get_intermediate_layers(images, reshape=True)
    assert feature_map.shape == (1, 32, 5, 6)
    if option == "dynamic_img_pad":
        other = torch.nn.functional.pad(images, (0, 3, 0, 2))
    else:
        other = torch.nn.functional.interpolate(images, (20, 24), mode="bilinear", antialias=True)
    assert torch.equal(model(images), model(other))


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    model = NepaViT(img_size=28, patch_size=14, embed_dim=384, depth=6, num_heads=6, num_classes=5)
    for name, module in model.named_modules():
        if name == "head":
            assert module.weight.abs().max() == 0
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.03), name  # no rescaling by depth
            assert module.bias.abs().max() == 0, name
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert all((block.gamma_1 == 1e-5).all() and (block.gamma_2 == 1e-5).all() for block in model.blocks)
    assert not list(model.blocks[0].attn.q_norm.parameters())


def test_rope_rescaling_only_in_training():
    model = NepaViT(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, init_values=1.0)
    images = torch.randn(1, 3, 16, 16)

    def run(seed):
        torch.manual_seed(seed)
        return model(images)

    model.train()
    assert torch.equal(run(0), run(0)) and not near(run(0), run(1), 1e-5)
    model.eval()
    assert torch.equal(run(0), run(1))
    fixed = NepaViT(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, rope_rescale_coords=1.0)
    assert torch.equal(fixed.train()(images), fixed.eval()(images))


def test_rope_rescaling_from_a_generator_of_its_own(small):
    """Coordinates times exp(u), with u from that generator; one more u for every forward pass."""
    small.train()
    periods, bound = small.rope.periods, math.log(2.0)
    drawn = torch.empty(2).uniform_(-bound, bound, generator=torch.Generator().manual_seed(7)).exp()
    rows = torch.tensor([-0.75, -0.25, 0.25, 0.75])
    for _ in range(2):
        small.rope.seed_factors(7)
        before = torch.get_rng_state()
        for factor in drawn:
            sine = small.rope.get_embed(shape=(4, 4))[::4, : len(periods)]
            torch.testing.assert_close(sine, (2 * math.pi * rows[:, None] * factor / periods).sin())
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
    small.rope.seed_factors(8)
    assert not torch.equal(small.rope.get_embed(shape=(4, 4))[::4, : len(periods)], sine)
    copy.deepcopy(small)


def test_rope_angles_are_float32(small):
    reference = small.eval().rope.get_embed(shape=(4, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(small.rope.get_embed(shape=(4, 4)), reference)
        assert small.train().rope.get_embed().dtype == torch.float32
    small.eval().bfloat16()
    assert small.rope.get_embed(shape=(4, 4)).dtype == torch.float32
    assert torch.equal(small.rope.get_embed(shape=(4, 4)), reference)


class _Record(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.shapes, self.attention = set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "scaled_dot_product" in str(func) and "backward" not in str(func):
            self.attention.append((str(func), args, kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.shapes.add(tuple(tensor.shape))
        return out


def test_no_mask_and_no_attention_matrix_in_training():
    model = NepaViT(img_size=24, patch_size=4, embed_dim=32, depth=2, num_heads=2).train()
    tokens = 37
    with _Record() as record:
        NextEmbeddingLoss()(*model.predict_next(torch.randn(2, 3, 24, 24))).backward()
    assert any(shape == (2, tokens, 32) for shape in record.shapes)
    assert not [shape for shape in record.shapes if shape[-2:] == (tokens, tokens)]
    assert len(record.attention) == 2
    for name, args, kwargs in record.attention:
        assert "flash" in name or "fused" in name
        assert args[4] is True and kwargs.get("attn_mask") is None  # is_causal


def test_reset_classifier_gives_a_pooled_head(small):
    small.reset_classifier(7)
    assert small(torch.randn(2, 3, 16, 16)).shape == (2, 7)
    assert isinstance(small.fc_norm, nn.LayerNorm) and small.head.weight.abs().max() == 0


def test_attention_of_a_single_call(toy, expected):
    images = expected["pixel_values"]
    assert near(toy(images, is_causal=False), expected["last_hidden_state_bidirectional"], 1e-5)
    assert near(
        toy.forward_intermediates(images, is_causal=False)[0], expected["last_hidden_state_bidirectional"], 1e-5
    )
    assert near(toy(images), expected["last_hidden_state"], 1e-5) and toy.is_causal


def test_patch_dropout_does_not_predict():
    model = NepaViT(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, patch_drop_rate=0.5)
    with pytest.raises(ValueError, match=r"Causal attention needs every patch: .* patch_drop_rate=0"):
        model.train()(torch.randn(1, 3, 16, 16))
    assert model.set_attention("bidirectional")(torch.randn(1, 3, 16, 16)).isfinite().all()
    with pytest.raises(ValueError, match="patch_drop_rate=0"):
        model.train().predict_next(torch.randn(1, 3, 16, 16))
    assert model.eval().predict_next(torch.randn(1, 3, 16, 16))[1].shape == (1, 17, 32)


# -- absolute positions, and masked inputs: ablations ------------------------------------------------------------------


@pytest.fixture
def absolute():
    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 1.0}
    return timm.create_model("nepa_vit_tiny_patch14_224", position_embedding="absolute", **size).eval()


def test_absolute_positions_are_added_to_the_input_and_not_to_the_targets(absolute):
    assert absolute.rope is None and absolute.pos_embed.shape == (1, 17, 32)
    nn.init.normal_(absolute.pos_embed)
    images = torch.randn(2, 3, 16, 16)
    embeddings, predictions = absolute.predict_next(images)
    patches = absolute.patch_embed(images)
    assert torch.equal(embeddings[:, 1:], patches) and torch.equal(embeddings, absolute.embed(images))
    x = embeddings + absolute.pos_embed
    for block in absolute.blocks:
        x = block(x, is_causal=True)
    torch.testing.assert_close(predictions, absolute.norm(x))
    torch.testing.assert_close(predictions, absolute.forward_features(images))
    with torch.no_grad():
        absolute.pos_embed[:, 9] += torch.randn(32)
    later = absolute.predict_next(images)[1]
    assert torch.equal(later[:, :9], predictions[:, :9]) and not near(later[:, 9:], predictions[:, 9:], 0.01)


def test_absolute_positions_travel_in_a_folder_and_follow_the_size(absolute, tmp_path):
    nn.init.normal_(absolute.pos_embed)
    images = torch.randn(2, 3, 16, 16)
    nepa_plugin.save_backbone(absolute, tmp_path / "timm")
    assert torch.equal(nepa_plugin.load_backbone(tmp_path / "timm")(images), absolute(images))
    with pytest.raises(nepa_plugin.CheckpointError, match="no place for pos_embed"):
        nepa_plugin.save_backbone(absolute, tmp_path / "nepa", layout="nepa")
    dynamic = nepa_plugin.load_backbone(tmp_path / "timm", dynamic_img_size=True)
    assert near(dynamic.predict_next(images)[1], absolute(images), 1e-5)
    wide = torch.randn(1, 3, 16, 32)
    assert near(dynamic.predict_next(wide)[1], dynamic.forward_features(wide), 1e-5)
    with pytest.raises(ValueError, match="Sequences need RoPE"):
        absolute.predict_next(embeddings=torch.zeros(1, 4, 32))
    with pytest.raises(ValueError, match="position_embedding='learned' is not one of"):
        timm.create_model("nepa_vit_tiny_patch14_224", position_embedding="learned")


def test_masked_inputs_are_not_seen_and_stay_targets(small):
    small.eval()
    images = torch.randn(2, 3, *small.patch_embed.img_size)
    patches = small.patch_embed.num_patches
    masked = torch.zeros(2, patches, dtype=torch.bool)
    masked[:, 1] = masked[0, 3] = True
    token = torch.randn(1, 1, small.embed_dim)
    embeddings, _ = small.predict_next(images, masked=masked, mask_token=token)
    assert torch.equal(embeddings, small.embed(images))
    with torch.no_grad():
        small.patch_embed.proj.bias.add_(0.5)
        other, seen = small.predict_next(images, masked=torch.ones_like(masked), mask_token=token)
        small.patch_embed.proj.bias.sub_(0.5)
        whole, again = small.predict_next(images, masked=torch.ones_like(masked), mask_token=token)
    assert not torch.equal(other, whole) and torch.equal(seen, again)
    with pytest.raises(ValueError, match="masked, one boolean per patch, goes with a mask_token"):
        small.predict_next(images, masked=masked)
