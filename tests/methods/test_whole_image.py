"""What the methods that compare whole images share: views, gradients, frozen parts, momentum encoders, errors."""

import copy
import math
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image

import nepa_plugin
from nepa_plugin.methods import BYOL, DINO, LeJEPA, MoCoV3, SimCLR, SimSiam, byol, dino, lejepa, mocov3, simclr, simsiam
from nepa_plugin.methods.multi_crop import whole_patches
from nepa_plugin.methods.transforms import build_transform
from nepa_plugin.methods.whole_image import check_class_token, freeze_patch_projection

SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 2}
METHODS = [SimCLR, MoCoV3, SimSiam, BYOL, DINO, LeJEPA]
MOMENTUM = [MoCoV3, BYOL, DINO]
MULTI_CROP = [DINO, LeJEPA]
FREEZING = [SimCLR, MoCoV3, SimSiam, BYOL]
HEADS = {
    SimCLR: {"projection_dim": 8},
    MoCoV3: {"projection_dim": 8},
    SimSiam: {"projection_dim": 8, "prediction_hidden_dim": 4},
    BYOL: {"projection_dim": 8},
    DINO: {"output_dim": 24, "bottleneck_dim": 8, "num_local_crops": 2},
    LeJEPA: {"projection_dim": 8, "num_vectors": 16, "num_local_crops": 2},
}


def build(cls, **kwargs):
    torch.manual_seed(0)
    args = {"backbone": "plain_vit_tiny_patch14_224", "img_size": 16, "patch_size": 4, "backbone_args": SIZE}
    return cls(**(args | {"num_classes": 3, "hidden_dim": 16} | HEADS[cls] | kwargs))


def views_of(cls, batch=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    sizes = (16, 16, 8, 8) if cls in MULTI_CROP else (16, 16)
    return [torch.randn(batch, 3, size, size, generator=generator) for size in sizes]


def step(model, views, seed=0):
    torch.manual_seed(seed)
    return model.step(views)


# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("pool", ["class", "mean"])
@pytest.mark.parametrize("name", ["plain_vit_tiny_patch14_224", "nepa_vit_tiny_patch14_224"])
def test_every_trainable_weight_gets_a_gradient_and_no_other(cls, pool, name):
    attention = {"attention": "bidirectional"} if name.startswith("nepa") else {}
    model = build(cls, backbone=name, pool=pool, backbone_args=SIZE | attention)
    loss, features = step(model, views_of(cls))
    assert features.shape == (4, 32) and loss.shape == () and loss.isfinite()
    loss.backward()
    for key, parameter in model.named_parameters():
        if key.startswith("online_classifier."):
            continue
        assert (parameter.grad is not None) == parameter.requires_grad, key
        if key.startswith("teacher_"):
            assert not parameter.requires_grad, key
    # Not only present: something reaches the first weights (LayerScale starts at 1e-5).
    first = model.backbone.blocks[0].attn.qkv.weight
    assert first.grad.abs().max() > 0


@pytest.mark.parametrize("cls", METHODS)
def test_a_step_is_a_function_of_the_seed(cls):
    name, args = "nepa_vit_tiny_patch14_224", SIZE | {"attention": "bidirectional"}  # with RoPE's random rescaling
    model = build(cls, backbone=name, backbone_args=args, drop_path_rate=0.5)
    results = []
    for seed in (3, 3, 4):
        copied = copy.deepcopy(model)
        loss, features = step(copied, views_of(cls), seed)
        loss.backward()
        results.append((loss, features, copied.backbone.blocks[0].attn.qkv.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not torch.equal(results[0][0], results[2][0])


@pytest.mark.parametrize("cls", METHODS)
def test_features_are_those_of_the_first_view(cls):
    model = build(cls, drop_path_rate=0.0)
    views = views_of(cls)
    _, features = step(model, views)
    with torch.no_grad():
        expected = getattr(model, model.exported).forward_features(views[0])[:, 0]
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("cls", MOMENTUM)
def test_the_momentum_encoder_moves_by_one_minus_m(cls):
    model = build(cls, momentum=0.8, final_momentum=0.8)
    model._trainer = SimpleNamespace(global_step=0, estimated_stepping_batches=10)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _, teacher in model.momentum_pairs():
        for parameter in teacher.parameters():
            parameter.data.add_(torch.randn_like(parameter))
    before = [[p.clone() for p in teacher.parameters()] for _, teacher in model.momentum_pairs()]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    model.optimizer_step(0, 0, optimizer, None)
    assert len(before) == 2  # the backbone and one head
    for (student, teacher), old in zip(model.momentum_pairs(), before, strict=True):
        for s, t, o in zip(student.parameters(), teacher.parameters(), old, strict=True):
            torch.testing.assert_close(t, 0.8 * o + 0.2 * s)  # s: after the optimizer's step


@pytest.mark.parametrize("cls", MOMENTUM)
def test_the_momentum_encoder_starts_equal(cls):
    for student, teacher in build(cls).momentum_pairs():
        for (name, s), t in zip(student.named_parameters(), teacher.parameters(), strict=True):
            assert torch.equal(s, t), name


# -- views -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", METHODS)
def test_views_have_the_models_size_and_normalisation(cls):
    plain = {"cj_prob": 0.0, "solarization_prob": 0.0}
    if cls in (SimCLR, SimSiam):
        del plain["solarization_prob"]
    model = build(cls, transform_args=plain)
    views = model.train_transform()(Image.new("RGB", (20, 24), (255, 255, 255)))
    assert [view.shape for view in views] == [view.shape[1:] for view in views_of(cls)]
    for view in views:  # white is 1, and (1 - 0.5) / 0.5 = 1
        torch.testing.assert_close(view, torch.ones_like(view), atol=1e-6, rtol=0)
    model.mean, model.std = (0.0, 0.25, 0.5), (1.0, 0.5, 0.25)
    view = model.train_transform()(Image.new("RGB", (20, 24), (255, 255, 255)))[0]
    torch.testing.assert_close(view[:, 0, 0], torch.tensor([1.0, 1.5, 2.0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("module", "sizes"), [
    (simclr, [224] * 2),
    (mocov3, [224] * 2),
    (simsiam, [224] * 2),
    (byol, [224] * 2),
    (dino, [224] * 2 + [98] * 10),
    (lejepa, [224] * 2 + [98] * 6),
])  # fmt: skip
def test_the_modules_transforms_are_those_of_imagenet(module, sizes):
    views = module.transform(Image.new("RGB", (256, 240), (255, 0, 128)))
    assert [tuple(view.shape) for view in views] == [(3, size, size) for size in sizes]
    assert all(view.min() >= -1.0001 and view.max() <= 1.0001 for view in views)


def test_blur_and_solarisation_differ_between_byols_views():
    first, second = (view.transform.transforms for view in byol.transform.transforms)
    of = lambda steps, name: next(s for s in steps if type(s).__name__ == name).prob  # noqa: E731
    assert (of(first, "GaussianBlur"), of(first, "RandomSolarization")) == (1.0, 0.0)
    assert (of(second, "GaussianBlur"), of(second, "RandomSolarization")) == (0.1, 0.2)


@pytest.mark.parametrize("cls", METHODS)
def test_an_unknown_option_of_the_transform_is_refused(cls):
    with pytest.raises(ValueError, match=r"transform_args: \w+ has no option hflip; it has .*hf_prob"):
        build(cls, transform_args={"hflip": 0.0})


def test_the_users_options_go_first():
    def options(a=1, b=2, c=3):
        return a, b, c

    assert build_transform(options, {"a": 10, "b": 20}, {"b": 30}) == (10, 30, 3)
    with pytest.raises(ValueError, match=r"options has no option d, e; it has a, b, c\."):
        build_transform(options, {}, {"e": 1, "d": 1})


# -- backbones ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", METHODS)
def test_a_class_token_that_sees_only_itself_is_refused(cls):
    args = {"backbone": "nepa_vit_tiny_patch14_224"}
    with pytest.raises(ValueError, match=r"bidirectional attention.*backbone_args: \{attention: bidirectional\}"):
        build(cls, **args)
    build(cls, pool="mean", **args)


def test_without_a_class_token_it_cannot_be_the_feature():
    with pytest.raises(ValueError, match=r"needs a backbone with a class token\. Set pool: mean\."):
        build(SimCLR, backbone_args=SIZE | {"class_token": False, "global_pool": "avg"})
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    check_class_token(vit, "class", "SimCLR")


@pytest.mark.parametrize("cls", FREEZING)
def test_the_patch_projection_is_random_and_frozen(cls):
    model = build(cls)
    projection = model.backbone.patch_embed.proj
    bound = math.sqrt(6 / (3 * 4 * 4 + 32))  # Glorot's
    assert 0.95 * bound < projection.weight.abs().max() <= bound and not projection.bias.any()
    assert not any(p.requires_grad for p in projection.parameters())
    trained = build(cls, freeze_patch_projection=False)
    assert all(p.requires_grad for p in trained.backbone.patch_embed.proj.parameters())


@pytest.mark.parametrize("cls", FREEZING)
def test_a_loaded_patch_projection_stays_as_it_is(cls, tmp_path):
    torch.manual_seed(5)
    model = timm.create_model("plain_vit_tiny_patch14_224", img_size=16, patch_size=4, **SIZE)
    nepa_plugin.save_backbone(model, tmp_path / "backbone")
    method = build(cls, init_from=str(tmp_path / "backbone"))
    assert torch.equal(method.backbone.patch_embed.proj.weight, model.patch_embed.proj.weight)
    assert not method.backbone.patch_embed.proj.weight.requires_grad


def test_a_patch_projection_of_several_layers_cannot_be_frozen():
    with pytest.raises(ValueError, match="freeze_patch_projection: false"):
        freeze_patch_projection(torch.nn.Linear(2, 2))


def test_local_views_are_whole_patches():
    assert whole_patches(None, 224, 14) == 98 and whole_patches(None, 224, 16) == 96
    assert whole_patches(None, 32, 4) == 12 and whole_patches(None, 16, 16) == 16
    assert whole_patches(16, 32, 4) == 16
    with pytest.raises(ValueError, match="local_crop_size=18 must be a multiple of the patch size 4"):
        whole_patches(18, 32, 4)


@pytest.mark.parametrize("cls", MULTI_CROP)
def test_the_backbone_takes_local_views_of_any_timm_vit(cls):
    model = build(cls, backbone="vit_tiny_patch16_224", pool="class")
    assert model.backbone.dynamic_img_size
    with pytest.raises(ValueError, match="local_crop_size=10"):
        build(cls, local_crop_size=10)
