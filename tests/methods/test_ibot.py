"""iBOT: its two losses, its masks, its teacher."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from nepa_plugin.methods import IBOT
from nepa_plugin.methods.ibot import transform

SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 2}
HEAD = {"output_dim": 24, "hidden_dim": 16, "bottleneck_dim": 8}


def ibot(**kwargs):
    """A model of 16x16 images with 4x4 patches, of which 4 to 8 are masked."""
    torch.manual_seed(0)
    args = {"backbone": "plain_vit_tiny_patch14_224", "img_size": 16, "patch_size": 4, "backbone_args": SIZE}
    args |= {"mask_ratio": (0.25, 0.5), "drop_path_rate": 0.0, "num_classes": 3}
    return IBOT(**(args | HEAD | kwargs))


@pytest.fixture
def views():
    """Two global views and two local ones of four images."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, size, size, generator=generator) for size in (16, 16, 8, 8)]


def step(model, views, seed=0):
    torch.manual_seed(seed)
    return model.step(views)


def disturb(model):
    """Make teacher and centers differ from where they start."""
    with torch.no_grad():
        for _, teacher in model.momentum_pairs():
            for parameter in teacher.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.mask_token.normal_()
        model.criterion.center.normal_(std=0.1)
        model.patch_criterion.center.center.normal_(std=0.1)


# -- loss --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_uniform_student_costs_log_k(views, weight):
    model = ibot(patch_loss_weight=weight)
    disturb(model)
    nn.init.zeros_(model.head.layers[-1].weight)  # the bottleneck is zero, and so are all logits
    assert step(model, views)[0].item() == pytest.approx((1 + weight / 2) * math.log(24), rel=1e-5)  # half is masked


def cross_entropy(teacher, center, student, temp):
    return -(((teacher - center) / temp).softmax(-1) * (student / 0.1).log_softmax(-1)).sum(-1)


@pytest.mark.parametrize("shared_head", [True, False])
@pytest.mark.parametrize("num_views", [2, 4])
def test_the_loss_written_out(views, shared_head, num_views):
    model = ibot(shared_head=shared_head)
    disturb(model)
    model.train()
    centers = model.criterion.center.clone()[0, 0], model.patch_criterion.center.value.clone()[0]
    torch.manual_seed(0)
    mask = model.masks(4)[0]
    patch_head = model.head if shared_head else model.patch_head
    teacher_patch_head = model.teacher_head if shared_head else model.teacher_patch_head
    with torch.no_grad():
        teacher = [model.teacher_backbone.forward_features(view) for view in views[:2]]
        student = [model.encode(view, part) for view, part in zip(views[:2], mask.split(4), strict=True)]
        student += [model.backbone.forward_features(view) for view in views[2:num_views]]
        pairs = [
            cross_entropy(model.teacher_head(t[:, 0]), centers[0], model.head(s[:, 0]), 0.04).mean()
            for i, t in enumerate(teacher)
            for j, s in enumerate(student)
            if i != j  # the same view is no pair
        ]
        expected = sum(pairs) / len(pairs)
        for t, s, part in zip(teacher, student, mask.split(4), strict=False):
            patches = cross_entropy(teacher_patch_head(t[:, 1:]), centers[1], patch_head(s[:, 1:]), 0.04)
            expected += ((patches * part).sum(1) / part.sum(1).clamp(min=1)).sum() / 8  # the mean over 8 global views
    loss, features = step(model, views[:num_views])
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features, teacher[0][:, 0], rtol=1e-4, atol=1e-5)


def test_the_mean_of_the_patches_can_stand_for_the_image(views):
    model = ibot(pool="mean", backbone_args=SIZE | {"class_token": False, "global_pool": "avg"})
    compared = []
    model.criterion.register_forward_hook(lambda module, args, output: compared.append(args))
    features = step(model, views)[1]
    with torch.no_grad():
        teacher = [model.teacher_backbone.forward_features(view).mean(dim=1) for view in views[:2]]
        local = model.backbone.forward_features(views[2]).mean(dim=1)
        torch.testing.assert_close(features, teacher[0])
        torch.testing.assert_close(compared[0][0][1], model.teacher_head(teacher[1]))
        torch.testing.assert_close(compared[0][1][2], model.head(local))


def test_the_student_sees_the_mask_token_in_place_of_masked_patches(views):
    model = ibot()
    disturb(model)
    mask = torch.zeros(4, 16, dtype=torch.bool)
    mask[:, 6] = True
    changed = views[0].clone()
    changed[:, :, 4:8, 8:12] += 1
    with torch.no_grad():
        assert torch.equal(model.encode(views[0], mask), model.encode(changed, mask))
        torch.testing.assert_close(model.encode(views[0], mask & False), model.backbone.forward_features(views[0]))
        assert not torch.allclose(model.encode(views[0], mask), model.backbone.forward_features(views[0]))


@pytest.mark.parametrize("shared_head", [True, False])
def test_gradients_reach_all_that_is_trained_and_not_the_teacher(views, shared_head):
    model = ibot(shared_head=shared_head, num_classes=0)
    step(model, views)[0].backward()
    for name, parameter in model.named_parameters():
        fixed = name.startswith("teacher_") or name.endswith("last_layer.parametrizations.weight.original0")
        assert parameter.requires_grad == (not fixed), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert model.mask_token.grad.abs().max() > 0


def test_the_prototypes_are_free_to_grow_where_asked():
    model = ibot(norm_last_layer=False)
    assert model.head.last_layer.parametrizations.weight.original0.requires_grad
    assert torch.equal(model.head.last_layer.weight.norm(dim=1).round(decimals=5), torch.ones(24))


def test_a_step_is_a_function_of_torchs_seed_and_leaves_pythons_alone(views):
    losses = []
    for seed in (0, 0, 1):
        random.seed(seed + 17 * len(losses))
        before = random.getstate()
        losses.append(step(ibot(), views, seed)[0])
        assert random.getstate() == before
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


# -- masks -------------------------------------------------------------------------------------------------------------


def test_half_of_the_images_are_masked_by_the_papers_ratio():
    torch.manual_seed(0)
    masks = ibot(img_size=56, mask_ratio=(0.1, 0.5)).masks.draw(400)
    ratio = masks.float().mean(dim=(1, 2))
    assert masks.shape == (400, 14, 14) and (ratio > 0).sum() == 200
    assert ratio.max() <= 0.5 and ratio[ratio > 0].mean().item() == pytest.approx(0.3, abs=0.02)


def test_some_patch_is_always_masked(views, monkeypatch):
    monkeypatch.setattr(
        "nepa_plugin.methods.masks.random_block_masks", lambda size, grid, *_: torch.zeros(size, grid, grid) > 0
    )
    model = ibot()
    assert model.masks.draw(4).sum() == 1
    assert step(model, views)[0].isfinite() and model.patch_criterion.center.value.isfinite().all()


# -- teacher -----------------------------------------------------------------------------------------------------------


def test_backbone_and_heads_of_the_teacher_follow(views):
    model = ibot(momentum=0.9, shared_head=False, num_classes=0)
    model._trainer = SimpleNamespace(global_step=0, estimated_stepping_batches=100)
    assert len(model.momentum_pairs()) == 3
    before = [[p.clone() for p in teacher.parameters()] for _, teacher in model.momentum_pairs()]
    for (student, _), start in zip(model.momentum_pairs(), before, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(student.parameters(), start, strict=True))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)

    def closure():
        optimizer.zero_grad()
        loss = step(model, views)[0]
        loss.backward()
        return loss

    model.optimizer_step(0, 0, optimizer, closure)
    for (student, teacher), start in zip(model.momentum_pairs(), before, strict=True):
        assert any(not torch.equal(p, q) for p, q in zip(teacher.parameters(), start, strict=True))
        for trained, moved, old in zip(student.parameters(), teacher.parameters(), start, strict=True):
            torch.testing.assert_close(moved, 0.9 * old + 0.1 * trained)


def test_the_temperature_warms_up():
    model = ibot(teacher_temp=0.07, warmup_teacher_temp=0.04, warmup_teacher_temp_fraction=0.25)
    assert model.current_teacher_temp() == 0.04
    temps = []
    for step_number in (0, 10, 25, 99):
        model._trainer = SimpleNamespace(global_step=step_number, estimated_stepping_batches=100)
        temps.append(model.current_teacher_temp())
    assert temps == pytest.approx([0.04, 0.052, 0.07, 0.07])


@pytest.mark.parametrize("epochs", [0, 1])
def test_the_prototypes_stay_in_the_first_epochs(views, epochs):
    model = ibot(freeze_last_layer=epochs, final_weight_decay=None, shared_head=False)
    step(model, views)[0].backward()
    model.on_before_optimizer_step(None)
    for head in (model.head, model.patch_head):
        kept = head.last_layer.parametrizations.weight.original1.grad is not None
        assert kept == (epochs == 0)
        assert head.layers[0].weight.grad is not None


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_global_and_local_views():
    image = Image.new("RGB", (40, 40), (255, 255, 255))
    plain = {"cj_prob": 0.0, "solarization_prob": 0.0}
    views = ibot(num_local_crops=3, transform_args=plain).train_transform()(image)
    assert [tuple(view.shape) for view in views] == [(3, 16, 16)] * 2 + [(3, 8, 8)] * 3
    assert all(torch.allclose(view, torch.ones_like(view)) for view in views)  # (1 - 0.5) / 0.5
    assert [view.shape[-1] for view in transform(image)] == [224] * 2 + [98] * 10


def test_the_local_crops_have_whole_patches():
    assert ibot(img_size=224, patch_size=14).local_crop_size == 98
    assert ibot(img_size=32, patch_size=4).local_crop_size == 12
    assert ibot(img_size=16, patch_size=4, local_crop_size=12).local_crop_size == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "nepa_vit_tiny_patch14_224"}, "iBOT hides patches and needs timm's VisionTransformer"),
        (
            {"backbone_args": SIZE | {"class_token": False, "global_pool": "avg"}},
            "needs a backbone with a class token. Set pool: mean",
        ),
        ({"local_crop_size": 10}, "local_crop_size=10 must be a multiple of the patch size 4"),
        ({"mask_ratio": (0.05, 0.5)}, "at least one of the 16 patches"),
        ({"mask_ratio": (0.5, 0.25)}, "ascending"),
        ({"batch_mask_ratio": 0.0}, "batch_mask_ratio=0.0"),
        ({"warmup_teacher_temp": 0.08}, r"warmup_teacher_temp=0.08 must be in \(0, teacher_temp=0.07\]"),
    ],
)
def test_what_cannot_be_trained_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ibot(**options)


def test_unknown_options_of_the_transform_are_refused():
    with pytest.raises(ValueError, match="IBOTTransform has no option flip_prob"):
        ibot(transform_args={"flip_prob": 0.0})
