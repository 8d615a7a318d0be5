"""I-JEPA: the blocks, the targets, and the momentum encoder that makes them."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from nepa_plugin import save_backbone
from nepa_plugin.methods import IJEPA
from nepa_plugin.methods.ijepa import transform
from nepa_plugin.methods.masks import BlockMasks

SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 2}
PREDICTOR = {"predictor_dim": 16, "predictor_depth": 1, "predictor_num_heads": 2}
BLOCKS = {"target_scale": (0.1, 0.15), "min_keep": 4}


def ijepa(**kwargs):
    """A model of 32x32 images with 8x8 patches of 4x4 pixels."""
    torch.manual_seed(0)
    args = {"backbone": "plain_vit_tiny_patch14_224", "img_size": 32, "patch_size": 4, "backbone_args": SIZE}
    return IJEPA(**(args | PREDICTOR | BLOCKS | {"num_classes": 3} | kwargs))


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def step(model, images, seed=0):
    torch.manual_seed(seed)
    return model.step([images])


def drawn(masks, batch_size):
    """The context's patches, and those of each target block."""
    context, targets = masks(batch_size)
    return context, list(targets.unbind(1))


# -- blocks ------------------------------------------------------------------------------------------------------------


def paper_masks(grid):
    return BlockMasks(grid, (0.85, 1.0), (0.15, 0.2), (0.75, 1.5), num_targets=4, min_keep=10)


@pytest.mark.parametrize("grid", [14, 16])
def test_the_papers_blocks(grid):
    torch.manual_seed(0)
    masks = paper_masks(grid)
    for _ in range(5):
        context, targets = drawn(masks, 8)
        assert len(targets) == 4
        for target in targets:
            assert target.shape == targets[0].shape
            assert 0.12 < target.shape[1] / grid**2 < 0.23
            for image in target:
                rows, columns = image // grid, image % grid
                height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
                assert height * width == len(image) and 0.6 < height / width < 1.7  # a full rectangle
        assert context.shape[0] == 8 and 10 < context.shape[1] < 0.75 * grid**2
        for i in range(8):
            taken = set(torch.cat([target[i] for target in targets]).tolist())
            assert not taken & set(context[i].tolist())


def test_the_digits_blocks_leave_enough_context():
    torch.manual_seed(0)
    masks = ijepa().masks
    sizes = [drawn(masks, 64)[0].shape[1] for _ in range(20)]
    # of 64 patches; the smallest of a batch counts, which in 2 % of lightly's own batches is 8 or less
    assert min(sizes) > 4 and sum(sizes) / len(sizes) > 14


def test_blocks_follow_torchs_generator():
    masks = paper_masks(14)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(drawn(masks, 2))
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(torch.stack(draws[0][1]), torch.stack(draws[1][1]))
    assert draws[0][0].shape != draws[2][0].shape or not torch.equal(draws[0][0], draws[2][0])


def test_block_sizes_differ_between_steps():
    torch.manual_seed(0)
    masks = paper_masks(16)
    assert len({drawn(masks, 1)[1][0].shape[1] for _ in range(20)}) == 3  # 6x7, 6x8 and 6x9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"min_keep": 10},
            "target blocks can be .* must have more than min_keep=10: lower min_keep or raise target_scale",
        ),
        (
            {"context_scale": (0.02, 0.05), "min_keep": 3},
            "context blocks can be .* lower min_keep or raise context_scale",
        ),
    ],
)
def test_blocks_too_small_for_the_grid_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ijepa(**options)


# -- loss --------------------------------------------------------------------------------------------------------------


class Oracle(nn.Module):
    """A predictor that returns what it is given, and keeps what it is asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.asked = None

    def forward(self, context, context_indices, target_indices):
        self.asked = context, context_indices, target_indices
        return self.answer


def expected_targets(model, images, targets):
    """Layer-normalised outputs of the momentum encoder: for each block all images, for each image its patches."""
    patches = model.teacher_backbone.forward_features(images)[:, 1:]
    patches = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return torch.stack([patches[i, block[i]] for block in targets for i in range(len(images))])


def test_targets_are_the_momentum_encoders_patches(images):
    model = ijepa()
    with torch.no_grad():
        for parameter in model.teacher_backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # so that it is not the trained one
    torch.manual_seed(0)
    context, targets = drawn(model.masks, 4)
    with torch.no_grad():
        answer = expected_targets(model, images, targets)
    model.predictor = Oracle(answer)
    loss, features = step(model, images)
    assert loss.item() == pytest.approx(0, abs=1e-9)
    encoded, asked_context, asked_targets = model.predictor.asked
    assert encoded.shape == (4, context.shape[1], 32)  # without the class token
    assert torch.equal(asked_context, context) and torch.equal(torch.stack(asked_targets), torch.stack(targets))
    with torch.no_grad():
        expected = model.teacher_backbone.forward_features(images)[:, 1:].mean(dim=1)
    torch.testing.assert_close(features, expected)
    model.predictor = Oracle(answer + 0.5)
    assert step(model, images)[0].item() == pytest.approx(0.125, rel=1e-4)  # half the square below 1
    model.predictor = Oracle(answer - 3)
    assert step(model, images)[0].item() == pytest.approx(2.5, rel=1e-4)  # and linear above


def test_the_encoder_sees_the_context_only(images):
    model = ijepa()
    torch.manual_seed(0)
    context, targets = drawn(model.masks, 4)
    outside, inside = images.clone(), images.clone()
    for changed, patch in ((outside, targets[0][0, 0]), (inside, context[0, 0])):
        row, column = divmod(int(patch), 8)
        changed[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
    with torch.no_grad():
        predictions = [model.predict(x, context, targets) for x in (images, outside, inside)]
    assert predictions[0].shape == (4 * 4, targets[0].shape[1], 32)
    assert torch.equal(predictions[0], predictions[1])
    assert not torch.equal(predictions[0][0], predictions[2][0])


def test_gradients_reach_all_that_is_trained_and_not_the_momentum_encoder(images):
    model = ijepa(num_classes=0)
    step(model, images)[0].backward()
    frozen = {"backbone.pos_embed", "predictor.decoder.pos_embed"}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name not in frozen and not name.startswith("teacher_")), name
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_the_momentum_encoder_follows(images):
    model = ijepa(momentum=0.9, num_classes=0)
    assert all(
        torch.equal(value, model.backbone.state_dict()[name])
        for name, value in model.teacher_backbone.state_dict().items()
    )
    model._trainer = SimpleNamespace(global_step=0, estimated_stepping_batches=100)
    before = {name: p.clone() for name, p in model.teacher_backbone.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)

    def closure():
        optimizer.zero_grad()
        loss = step(model, images)[0]
        loss.backward()
        return loss

    model.optimizer_step(0, 0, optimizer, closure)
    trained = dict(model.backbone.named_parameters())
    for name, parameter in model.teacher_backbone.named_parameters():
        torch.testing.assert_close(parameter, 0.9 * before[name] + 0.1 * trained[name])
    weight = "blocks.1.mlp.fc2.bias"
    assert not torch.equal(model.teacher_backbone.get_parameter(weight), before[weight])


def test_a_step_is_a_function_of_the_seed(images):
    model = ijepa()
    assert torch.equal(step(model, images)[0], step(model, images)[0])
    assert not torch.equal(step(model, images)[0], step(model, images, seed=1)[0])


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_given_weights_are_kept(tmp_path):
    source = ijepa().backbone
    with torch.no_grad():
        source.pos_embed.normal_()
    save_backbone(source, tmp_path / "start")
    model = ijepa(init_from=str(tmp_path / "start"))
    for backbone in (model.backbone, model.teacher_backbone):
        assert all(torch.equal(value, backbone.state_dict()[name]) for name, value in source.state_dict().items())


def test_the_papers_vit_without_class_token(images):
    model = ijepa(backbone_args=SIZE | {"class_token": False, "global_pool": "avg"})
    loss, features = step(model, images)
    assert 0 < loss.item() < 1 and features.shape == (4, 32)


def test_one_view():
    white = Image.new("RGB", (40, 40), (255, 255, 255))
    (view,) = ijepa().train_transform()(white)
    assert view.shape == (3, 32, 32) and torch.allclose(view, torch.ones(3, 32, 32))
    assert transform(white)[0].shape == (3, 224, 224)
    left_black = Image.new("RGB", (32, 32), (255, 255, 255))
    left_black.paste((0, 0, 0), (0, 0, 16, 32))
    views = [ijepa(crop_scale=(1.0, 1.0)).train_transform()(left_black)[0] for _ in range(8)]
    assert all(view[:, :, 0].mean() < 0 for view in views)  # never flipped


def test_another_backbone_is_refused():
    with pytest.raises(ValueError, match="I-JEPA hides patches and needs timm's VisionTransformer, not NepaViT"):
        ijepa(backbone="nepa_vit_tiny_patch14_224")
