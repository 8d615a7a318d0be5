"""DINO: its loss, its center and temperatures, its prototypes."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nepa_plugin.methods import DINO

SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def dino(**kwargs):
    torch.manual_seed(0)
    args = {"backbone": "plain_vit_tiny_patch14_224", "img_size": 16, "patch_size": 4, "backbone_args": SIZE}
    heads = {"output_dim": 24, "hidden_dim": 16, "bottleneck_dim": 8, "num_local_crops": 2}
    return DINO(**(args | heads | {"num_classes": 0, "drop_path_rate": 0.0} | kwargs))


@pytest.fixture
def views():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, size, size, generator=generator) for size in (16, 16, 8, 8)]


def disturb(model):
    """Make teacher and center differ from where they start."""
    with torch.no_grad():
        for _, teacher in model.momentum_pairs():
            for parameter in teacher.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.criterion.center.normal_(std=0.1)


def logits(backbone, head, images):
    with torch.no_grad():
        return head(backbone.forward_features(images)[:, 0])


@pytest.mark.parametrize("temps", [(0.1, 0.04), (0.2, 0.1)])
def test_loss_is_the_papers(views, temps):
    """The cross-entropy of the student's views with the teacher's of other global views, over all such pairs."""
    student_temp, teacher_temp = temps
    model = dino(student_temp=student_temp, teacher_temp=teacher_temp, warmup_teacher_temp=teacher_temp)
    disturb(model)
    center = model.criterion.center.reshape(-1).clone()
    total = pairs = 0
    for t, global_view in enumerate(views[:2]):
        taught = logits(model.teacher_backbone, model.teacher_head, global_view)
        target = ((taught - center) / teacher_temp).softmax(1)
        for s, view in enumerate(views):
            if s == t:
                continue
            log_p = (logits(model.backbone, model.head, view) / student_temp).log_softmax(1)
            total -= (target * log_p).sum(1).mean().item()
            pairs += 1
    assert pairs == 6
    assert model.step(views)[0].item() == pytest.approx(total / pairs, rel=1e-4)


def test_a_uniform_student_costs_log_k(views):
    model = dino()
    disturb(model)
    nn.init.zeros_(model.head.layers[-1].weight)  # the bottleneck is zero, and so are all logits
    assert model.step(views)[0].item() == pytest.approx(math.log(24), rel=1e-5)


def test_without_local_views_there_are_two_pairs(views):
    model = dino(num_local_crops=0)
    assert not model.backbone.dynamic_img_size
    disturb(model)
    center = model.criterion.center.reshape(-1).clone()
    total = 0.0
    for t, s in ((0, 1), (1, 0)):
        target = ((logits(model.teacher_backbone, model.teacher_head, views[t]) - center) / 0.04).softmax(1)
        total -= (target * (logits(model.backbone, model.head, views[s]) / 0.1).log_softmax(1)).sum(1).mean().item()
    assert model.step(views[:2])[0].item() == pytest.approx(total / 2, rel=1e-4)


def test_the_center_follows_the_teacher(views):
    model = dino()
    disturb(model)
    before = model.criterion.center.clone()
    taught = logits(model.teacher_backbone, model.teacher_head, torch.cat(views[:2]))
    model.step(views)
    torch.testing.assert_close(model.criterion.center.reshape(-1), 0.9 * before.reshape(-1) + 0.1 * taught.mean(0))


def test_the_teachers_temperature_warms_up():
    model = dino(warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_fraction=0.2)
    assert model.current_teacher_temp() == 0.04  # without a trainer
    temps = []
    for step in range(0, 100, 5):
        model._trainer = SimpleNamespace(global_step=step, estimated_stepping_batches=100)
        temps.append(model.current_teacher_temp())
    assert temps[0] == pytest.approx(0.04) and temps[2] == pytest.approx(0.055)
    assert temps[4:] == pytest.approx([0.07] * 16)


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_the_prototypes_stay_in_the_first_epochs(views, epoch):
    model = dino(freeze_last_layer=2, final_weight_decay=None)
    model._trainer = SimpleNamespace(
        global_step=0,
        estimated_stepping_batches=10,
        current_epoch=epoch,
        log_every_n_steps=50,
    )
    model.step(views)[0].backward()
    model.on_before_optimizer_step(None)
    prototypes = [p for p in model.head.last_layer.parameters() if p.requires_grad]
    assert len(prototypes) == 1 and (prototypes[0].grad is None) == (epoch < 2)
    assert model.head.layers[0].weight.grad is not None


def test_prototypes_are_unit_vectors():
    model = dino()
    assert torch.allclose(model.head.last_layer.weight.norm(dim=1), torch.ones(24), atol=1e-6)
    free = dino(norm_last_layer=False)
    assert sum(p.requires_grad for p in free.head.last_layer.parameters()) == 2


def test_defaults_are_the_recipe():
    model = DINO(backbone="plain_vit_tiny_patch14_224", num_classes=0, output_dim=16)
    assert (model.base_lr, model.min_lr, model.weight_decay, model.final_weight_decay) == (7.5e-4, 2e-6, 0.04, 0.4)
    assert (model.momentum, model.final_momentum, model.num_local_crops, model.local_crop_size) == (0.996, 1.0, 10, 98)
    assert model.exported == "teacher_backbone"


def test_temperatures_must_ascend():
    with pytest.raises(ValueError, match=r"warmup_teacher_temp=0\.1 must be in"):
        dino(warmup_teacher_temp=0.1, teacher_temp=0.07)
