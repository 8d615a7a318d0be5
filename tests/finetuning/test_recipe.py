import math
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from nepa_plugin.finetuning import ClassifierModule, Recipe, classifier
from nepa_plugin.finetuning.optimization import layer_scale, lr_factor, parameter_groups

CLASSES = list("abcde")
SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}


def _model(name="nepa_vit_tiny_patch14_224"):
    torch.manual_seed(0)
    return timm.create_model(name, **SIZES)


def _optimizers(module, steps, accumulated=1):
    """The optimizer and schedule of a run of so many steps in one process."""
    about = {"estimated_stepping_batches": steps, "world_size": 1, "accumulate_grad_batches": accumulated}
    module._trainer = SimpleNamespace(**about, precision="32-true")
    return module.configure_optimizers()


def test_layer_scales_are_the_published_ones():
    names = ["blocks.2.norm1.weight", "blocks.0.attn.qkv.weight", "backbone.blocks.1.gamma_1", "cls_token"]
    assert [layer_scale(name, 3, 0.5) for name in names] == [1.0, 0.25, 0.5, 0.125]
    assert [layer_scale(name, 3, 0.5) for name in ("norm.weight", "fc_norm.bias", "head.weight")] == [None, 1.0, None]


def test_groups_cover_every_trained_parameter_once():
    options = Recipe(layer_decay=0.5, head_lr=0.03)
    network = classifier(_model(), CLASSES, options)
    groups = parameter_groups(network, 3, 0.1, options)
    grouped = [id(p) for group in groups for p in group["params"]]
    trained = [id(p) for p in network.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trained)
    by_id = {id(p): group for group in groups for p in group["params"]}
    found = {name: by_id[id(p)] for name, p in network.named_parameters() if p.requires_grad}
    assert not any(name.startswith("patch_embed") for name in found)
    assert found["blocks.0.attn.qkv.weight"]["lr"] == pytest.approx(0.025)
    assert found["blocks.2.attn.qkv.weight"]["lr"] == pytest.approx(0.1)
    assert found["head.weight"]["lr"] == found["norm.bias"]["lr"] == 0.03
    assert found["fc_norm.weight"]["lr"] == pytest.approx(0.1)
    assert found["blocks.0.attn.qkv.weight"]["weight_decay"] == 0.05
    assert found["blocks.0.attn.qkv.bias"]["weight_decay"] == found["blocks.0.gamma_1"]["weight_decay"] == 0
    assert found["cls_token"]["weight_decay"] == 0.05


def test_warm_up_then_cosine():
    factors = [lr_factor(step, 100, 20) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 21) and factors[19] == pytest.approx(20 / 21) and factors[20] == 1
    assert factors[60] == pytest.approx(0.5) and factors[100] == pytest.approx(0)
    assert lr_factor(0, 100, 0) == 0.5 and lr_factor(1, 100, 0) == 1  # at least one step


def test_layer_warm_up_starts_the_last_block_first():
    options = Recipe(layer_decay=0.5, warmup_fraction=0.4)
    (optimizer,), (schedule,) = _optimizers(ClassifierModule(classifier(_model(), CLASSES, options), options, 256), 100)
    scheduler = schedule["scheduler"]
    for _ in range(10):
        optimizer.step()
        scheduler.step()
    shares = {group["lr_scale"]: group["lr"] / group["initial_lr"] for group in optimizer.param_groups}
    assert shares[0.25] == pytest.approx(11 / 31)  # 40 x (1 - 0.25) = 30 steps of warm-up
    assert shares[0.5] == pytest.approx(11 / 21)
    assert shares[1.0] == pytest.approx(0.5 * (1 + math.cos(math.pi * 9 / 99)))


@pytest.mark.parametrize("name", ["nepa_vit_tiny_patch14_224", "plain_vit_tiny_patch14_224"])
def test_head_starts_at_zero_on_the_mean_of_the_patch_tokens(name):
    model = _model(name).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    network = classifier(model, CLASSES, Recipe(drop_path_rate=0.2, attention=None)).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(network(images), torch.zeros(2, 5))
        nn.init.normal_(network.head.weight)
        mean = model.forward_features(images)[:, 1:].mean(1)
        expected = nn.functional.layer_norm(mean, (32,), eps=1e-12) @ network.head.weight.T
        torch.testing.assert_close(network(images), expected, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    blocks = getattr(network, "backbone", network).blocks
    assert blocks[2].drop_path1.drop_prob == pytest.approx(0.2)


def test_attention_mode():
    assert classifier(_model(), CLASSES, Recipe(attention="bidirectional")).attention == "bidirectional"
    assert classifier(_model(), CLASSES, Recipe()).attention == "bidirectional"
    assert classifier(_model(), CLASSES, Recipe(attention="causal")).attention == "causal"
    assert classifier(_model(), CLASSES, Recipe(attention=None)).attention == "causal"
    with pytest.raises(ValueError, match="bidirectional attention only"):
        classifier(_model("plain_vit_tiny_patch14_224"), CLASSES, Recipe(attention="causal"))


def test_qk_norm_gains_a_weight_of_ones():
    network = classifier(_model(), CLASSES, Recipe())
    for block in network.blocks:
        assert torch.equal(block.attn.q_norm.weight, torch.ones(16)) and block.attn.q_norm.bias is None
        assert torch.equal(block.attn.k_norm.weight, torch.ones(16))
    assert classifier(_model(), CLASSES, Recipe(qk_norm_affine=False)).blocks[0].attn.q_norm.weight is None
    # a weight that is there already stays
    model = timm.create_model("nepa_vit_tiny_patch14_224", qk_norm_affine=True, **SIZES)
    nn.init.constant_(model.blocks[1].attn.k_norm.weight, 0.3)
    assert torch.equal(classifier(model, CLASSES, Recipe()).blocks[1].attn.k_norm.weight, torch.full((16,), 0.3))


# RECIPES of ViT-B and ViT-L: base lr per 256, layer decay, warm-up; batch 1024, 100 epochs, head lr 1e-3
PUBLISHED = {"base": (1.5e-3, 0.65, 0.2, 12), "large": (1e-3, 0.75, 0.3, 24)}


def _published_rate(name, step, size):
    """The published learning rate of a parameter at a step, written out."""
    base, decay, warmup, depth = PUBLISHED[size]
    steps = 100 * 1251
    if name.startswith("blocks."):
        factor = decay ** (depth - 1 - int(name.split(".")[1]))
    else:
        factor = {"cls_token": decay**depth, "fc_norm": 1.0}.get(name.split(".")[0], 1.0)
    peak = 1e-3 if name.split(".")[0] in ("norm", "head") else 4 * base * factor
    warm = max(1, warmup * steps * (1 - factor))
    if step < warm:
        return peak * (step + 1) / (warm + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


@pytest.mark.parametrize("size", ["base", "large"])
def test_every_group_follows_the_published_recipe_over_the_whole_schedule(size):
    base, decay, warmup, _ = PUBLISHED[size]
    options = Recipe(lr=base, layer_decay=decay, warmup_fraction=warmup)
    name = f"nepa_vit_{size}_patch14_224"
    network = timm.create_model(name, num_classes=1000, qk_norm_affine=True, device="meta")
    network.patch_embed.requires_grad_(False)
    (optimizer,), (schedule,) = _optimizers(ClassifierModule(network, options, 256), 100 * 1251, accumulated=4)
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    grouped = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(n for n, p in network.named_parameters() if not n.startswith("patch_embed."))
    for group, factor in zip(optimizer.param_groups, schedule["scheduler"].lr_lambdas, strict=True):
        for parameter in group["params"]:
            own = names[id(parameter)]
            assert group["weight_decay"] == (
                0.05 if own == "cls_token" or (own.endswith(".weight") and parameter.ndim == 2) else 0
            )
            for step in (0, 1, 100, 5_000, 20_000, 25_019, 37_530, 62_550, 110_000, 125_099):
                assert group["initial_lr"] * factor(step) == pytest.approx(_published_rate(own, step, size), rel=1e-9)
