"""MAE: what is masked, what is predicted, and from what."""

import pytest
import torch
from lightly.models.utils import get_2d_sine_cosine_positional_embedding
from PIL import Image

from nepa_plugin import save_backbone
from nepa_plugin.methods import MAE
from nepa_plugin.methods.mae import transform

SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 2}
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}


def mae(**kwargs):
    torch.manual_seed(0)
    args = {"backbone": "plain_vit_tiny_patch14_224", "img_size": 16, "patch_size": 4, "backbone_args": SIZE}
    return MAE(**(args | DECODER | {"num_classes": 3} | kwargs))


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def step(model, images, seed=0):
    torch.manual_seed(seed)
    return model.step([images])


def patch_of(images, index):
    """Pixels of a patch of the 4x4 grid: rows, columns, then channels."""
    row, column = divmod(index, 4)
    return images[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].permute(1, 2, 0).flatten()


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_targets_are_the_masked_patches(images, norm_pix_loss):
    model = mae(norm_pix_loss=norm_pix_loss)
    masked = torch.tensor([[0, 5], [15, 3], [7, 8], [1, 2]])
    targets = model.targets(images, masked)
    for image, indices, target in zip(images, masked.tolist(), targets, strict=True):
        for index, pixels in zip(indices, target, strict=True):
            expected = patch_of(image, index)
            if norm_pix_loss:
                expected = (expected - expected.mean()) / (expected.var() + 1e-6).sqrt()
            torch.testing.assert_close(pixels, expected)


def test_predicting_zero_costs_the_variance_of_the_targets(images):
    model = mae()
    torch.nn.init.zeros_(model.decoder_pred.weight)
    assert step(model, images)[0].item() == pytest.approx(47 / 48, rel=1e-4)  # 48 numbers of unbiased variance 1


def test_a_quarter_is_visible_and_the_rest_has_no_influence(images):
    model = mae()
    seen = []
    model.backbone.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    torch.manual_seed(0)
    noise = torch.rand(4, 16)  # what the mask is drawn from: the lowest four stay
    keep, masked = noise.argsort(dim=1)[:, :4], noise.argsort(dim=1)[:, 4:]
    loss, features = step(model, images)
    assert seen[0].shape == (4, 1 + 4, 32)
    hidden, shown = images.clone(), images.clone()
    for i in range(4):
        for changed, index in ((hidden, masked[i, 0]), (shown, keep[i, 0])):
            row, column = divmod(int(index), 4)
            changed[i, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += torch.randn(3, 4, 4)
    other_loss, other_features = step(model, hidden)
    assert torch.equal(features, other_features) and not torch.equal(loss, other_loss)  # only the target has changed
    assert (step(model, shown)[1] != features).any(dim=1).all()


def test_the_decoder_puts_patches_back_where_they_were(images):
    """With no attention and no MLP, a masked patch's prediction depends on its position only, a mask token's."""
    model = mae()
    for block in model.decoder.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
        torch.nn.init.zeros_(block.mlp.fc2.weight)
    keep, masked = torch.tensor([[3, 1], [0, 2]]), torch.tensor([[9, 4], [4, 11]])
    predicted = model.reconstruct(torch.randn(2, 3, 32), keep, masked)
    token = model.decoder.mask_token[0, 0] + model.decoder.pos_embed[0, 1 + 4]
    torch.testing.assert_close(predicted[0, 1], model.decoder_pred(model.decoder.norm(token)))
    torch.testing.assert_close(predicted[0, 1], predicted[1, 0])
    assert not torch.allclose(predicted[0, 0], predicted[1, 1])


def test_gradients_reach_all_that_is_trained(images):
    model = mae(num_classes=0)
    step(model, images)[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not name.endswith("pos_embed")), name
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_every_weight_has_one_name():
    model = mae(num_classes=0)
    own = {n.split(".")[0] for n in model.state_dict()}
    assert own == {"backbone", "decoder", "decoder_embed", "decoder_pred"}


def test_the_backbone_starts_as_in_the_paper():
    backbone = mae().backbone
    expected = torch.from_numpy(get_2d_sine_cosine_positional_embedding(32, 4)).float()
    assert torch.equal(backbone.pos_embed[0], expected) and expected[0].abs().sum() == 0
    bound = (6 / (32 + 96)) ** 0.5  # Xavier, uniform
    weight = backbone.blocks[0].attn.qkv.weight
    assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_given_weights_are_kept(tmp_path):
    torch.manual_seed(7)
    source = mae().backbone
    with torch.no_grad():
        source.pos_embed.normal_()
    save_backbone(source, tmp_path / "start")
    model = mae(init_from=str(tmp_path / "start"))
    assert all(torch.equal(value, model.backbone.state_dict()[name]) for name, value in source.state_dict().items())
    assert not model.backbone.pos_embed.requires_grad


def test_a_step_is_a_function_of_the_seed(images):
    model = mae()
    assert torch.equal(step(model, images)[0], step(model, images)[0])
    assert not torch.equal(step(model, images)[0], step(model, images, seed=1)[0])


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_features_are_of_the_visible_tokens(images, pool):
    model = mae(pool=pool)
    outputs = []
    model.backbone.norm.register_forward_hook(lambda module, args, output: outputs.append(output))
    features = step(model, images)[1]
    expected = outputs[0][:, 0] if pool == "class" else outputs[0][:, 1:].mean(dim=1)
    assert torch.equal(features, expected)


def test_other_backbones(images):
    args = {"backbone_args": SIZE | {"class_token": False, "global_pool": "avg"}, "pool": "mean"}
    for model in (mae(**args), mae(backbone_args=SIZE | {"reg_tokens": 2}), mae(backbone="vit_tiny_patch16_224")):
        assert step(model, images)[0].item() == pytest.approx(1.0, abs=0.8)


def test_one_view():
    white = Image.new("RGB", (40, 40), (255, 255, 255))
    (view,) = mae().train_transform()(white)
    assert view.shape == (3, 16, 16) and torch.allclose(view, torch.ones(3, 16, 16))  # (1 - 0.5) / 0.5
    assert transform(white)[0].shape == (3, 224, 224)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_crop_and_flip_are_options(probability):
    left_black = Image.new("RGB", (16, 16), (255, 255, 255))
    left_black.paste((0, 0, 0), (0, 0, 8, 16))
    model = mae(crop_scale=(1.0, 1.0), hflip_prob=probability)
    views = torch.stack([model.train_transform()(left_black)[0] for _ in range(8)])
    left_is_dark = views[:, :, :, 0].mean(dim=(1, 2)) < 0
    assert (left_is_dark == (probability == 0)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"backbone": "nepa_vit_tiny_patch14_224"},
            "MAE hides patches and needs timm's VisionTransformer, not NepaViT",
        ),
        ({"backbone_args": SIZE | {"pos_embed": "none"}}, "needs a backbone with a position embedding"),
        ({"backbone_args": {"embed_dim": 30, "depth": 1, "num_heads": 2}}, "multiple of 4 as embed_dim, got 30"),
        ({"img_size": 18}, "square images of whole patches, not 18x18 with patch_size 4"),
        ({"mask_ratio": 0.0}, "mask_ratio=0.0 of 16 patches must leave some visible and mask some"),
        ({"mask_ratio": 0.95}, "mask_ratio=0.95 of 16 patches must leave some visible and mask some"),
    ],
)
def test_what_cannot_be_trained_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mae(**options)


@pytest.mark.parametrize("crop_scale", [(0.0, 1.0), (0.5, 0.2), (0.5, 1.5)])
def test_impossible_crops_are_refused(crop_scale):
    with pytest.raises(ValueError, match=r"crop_scale(\[\d\])? must be in"):
        mae(crop_scale=crop_scale)


def test_impossible_flips_are_refused():
    with pytest.raises(ValueError, match="hflip_prob must be in"):
        mae(hflip_prob=2.0)
