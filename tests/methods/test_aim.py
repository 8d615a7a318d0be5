"""AIM: who sees whom, what is predicted, and how long the prefixes are."""

import pytest
import torch
from lightly.models.modules import MaskedCausalVisionTransformer
from lightly.models.utils import get_2d_sine_cosine_positional_embedding
from PIL import Image
from torch import nn

from nepa_plugin import load_backbone, save_backbone
from nepa_plugin.methods import AIM
from nepa_plugin.methods.aim import prefix_attention, transform

SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def aim(**kwargs):
    torch.manual_seed(0)
    args = {"backbone": "plain_vit_tiny_patch14_224", "img_size": 16, "patch_size": 4, "backbone_args": SIZE}
    model = AIM(**(args | {"num_classes": 3, "head_dim": 16, "head_blocks": 1} | kwargs))
    for block in model.backbone.blocks:  # so that what attention does shows in the outputs
        nn.init.ones_(block.ls1.gamma)
        nn.init.ones_(block.ls2.gamma)
    return model


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def aim_backbone(start):
    """The backbone's weights as they are after construction from given ones."""
    args = {"backbone": "plain_vit_tiny_patch14_224", "img_size": 16, "patch_size": 4, "backbone_args": SIZE}
    return AIM(init_from=str(start), num_classes=0, head_dim=16, head_blocks=1, **args).backbone.state_dict()


def step(model, images, seed=0):
    torch.manual_seed(seed)
    return model.step([images])


def predicted_after(*prefixes):
    """Which of patches 1 ... 15 are predicted, for prefixes of these lengths."""
    return torch.arange(1, 16) >= torch.tensor(prefixes)[:, None]


def test_the_prefix_sees_itself_and_the_rest_sees_what_came_before():
    allowed = prefix_attention(torch.tensor([[False, False, True, True], [False, True, True, True]]))
    assert allowed.int().tolist() == [
        [[[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]],
        [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]],
    ]


def test_attention_is_lightlys(images):
    model = aim()
    reference = MaskedCausalVisionTransformer(
        img_size=16, patch_size=4, num_classes=0, init_values=1e-5, qk_norm=True, **SIZE
    )
    reference.load_state_dict(model.backbone.state_dict())
    predicted = predicted_after(1, 5, 9, 15)
    mask = torch.cat([torch.zeros(4, 2, dtype=torch.bool), predicted], dim=1)  # class token and first patch
    torch.testing.assert_close(model.tokens(images, predicted), reference.forward_features(images, mask=mask))


@pytest.mark.parametrize("patch", [0, 4, 9, 15])
def test_a_prediction_sees_the_prefix_and_the_patches_before_it(images, patch):
    """The output at patch i predicts patch i + 1."""
    model = aim()
    predicted = predicted_after(6, 6, 6, 6)  # patches 0 ... 5 are the prefix
    changed = images.clone()
    row, column = divmod(patch, 4)
    changed[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
    with torch.no_grad():
        before, after = (model.tokens(x, predicted)[:, 1:] for x in (images, changed))
    differs = (before - after).abs().amax(dim=(0, 2)) > 1e-4
    assert differs.tolist() == [patch < 6 or i >= patch for i in range(16)]


class Oracle(nn.Module):
    """Returns what it is given, whatever it is asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, tokens):
        assert len(tokens) == len(self.answer)
        return self.answer


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_next_patch_is_predicted(images, norm_pix_loss):
    model = aim(norm_pix_loss=norm_pix_loss)
    torch.manual_seed(0)
    predicted, _ = model.masks(4)
    answers = []
    for image, row in zip(images, predicted, strict=True):
        for index in (row.nonzero()[:, 0] + 1).tolist():
            y, x = divmod(index, 4)
            pixels = image[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].permute(1, 2, 0).flatten()
            answers.append((pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt() if norm_pix_loss else pixels)
    model.head = Oracle(torch.stack(answers))
    assert step(model, images)[0].item() == pytest.approx(0, abs=1e-9)
    model.head = Oracle(torch.stack(answers) + 3)
    assert step(model, images)[0].item() == pytest.approx(9, rel=1e-5)


def test_predicting_zero_costs_the_variance_of_the_targets(images):
    model = aim()
    nn.init.zeros_(model.head.blocks[-1].weight)
    assert step(model, images)[0].item() == pytest.approx(47 / 48, rel=1e-4)


def test_prefixes_have_every_length_equally_often():
    torch.manual_seed(0)
    predicted, chosen = aim().masks(15_000)
    assert torch.equal(predicted.flatten().nonzero()[:, 0], chosen)
    lengths = 16 - predicted.sum(dim=1)
    assert (predicted.int().diff(dim=1) >= 0).all()  # once predicted, always predicted
    counts = lengths.bincount(minlength=17)
    assert counts[0] == 0 and counts[16] == 0
    assert counts[1:16].min() > 850 and counts[1:16].max() < 1150


def test_gradients_reach_all_that_is_trained(images):
    model = aim(num_classes=0)
    step(model, images)[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name != "backbone.pos_embed"), name
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_the_position_embedding_is_fixed_unless_weights_are_given(images, tmp_path):
    source = aim().backbone
    expected = torch.from_numpy(get_2d_sine_cosine_positional_embedding(32, 4)).float()
    assert torch.equal(source.pos_embed[0], expected)
    with torch.no_grad():
        source.pos_embed.normal_()
    save_backbone(source, tmp_path / "start")
    kept = aim_backbone(tmp_path / "start")
    assert all(torch.equal(value, kept[name]) for name, value in source.state_dict().items())


def test_the_exported_backbone_is_bidirectional(images, tmp_path):
    model = aim()
    save_backbone(model.backbone, tmp_path / "backbone")
    exported = load_backbone(tmp_path / "backbone")
    changed = images.clone()
    changed[:, :, 12:, 12:] += 1  # the last patch
    with torch.no_grad():
        differs = (exported.forward_features(images) - exported.forward_features(changed)).abs().amax(dim=(0, 2))
        torch.testing.assert_close(model.eval()(images), exported.forward_features(images)[:, 1:].mean(dim=1))
    assert (differs > 1e-4).all()


def test_says_how_it_attends():
    assert aim().attention == "causal after a bidirectional prefix"


def test_a_step_is_a_function_of_the_seed(images):
    model = aim()
    assert torch.equal(step(model, images)[0], step(model, images)[0])
    assert not torch.equal(step(model, images)[0], step(model, images, seed=1)[0])


def test_features_are_the_mean_of_the_patches(images):
    model = aim()
    torch.manual_seed(0)
    tokens = model.tokens(images, model.masks(4)[0])
    torch.testing.assert_close(step(model, images)[1], tokens[:, 1:].mean(dim=1))


def test_a_backbone_without_class_token(images):
    loss, features = step(aim(backbone_args=SIZE | {"class_token": False, "global_pool": "avg"}), images)
    assert loss.item() == pytest.approx(1.2, abs=0.8) and features.shape == (4, 32)


def test_one_view():
    white = Image.new("RGB", (40, 40), (255, 255, 255))
    (view,) = aim().train_transform()(white)
    assert view.shape == (3, 16, 16) and torch.allclose(view, torch.ones(3, 16, 16))
    assert transform(white)[0].shape == (3, 224, 224)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"backbone": "nepa_vit_tiny_patch14_224"},
            "AIM hides patches and needs timm's VisionTransformer, not NepaViT",
        ),
        ({"patch_size": 16}, "AIM predicts the next patch, but the image is a single one"),
    ],
)
def test_what_cannot_be_trained_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        aim(**options)
