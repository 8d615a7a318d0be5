"""The parameters of an augmentation, and the draws that all pipelines share."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import InterpolationMode, v2

import nepa_plugin.methods
from nepa_plugin.data.samples import torch_seeded
from nepa_plugin.data.transforms import NEPATransform, crop_flip, eval_transform

SMALL = {
    "backbone": "vit_tiny_patch16_224",
    "img_size": 64,
    "patch_size": 8,
    "backbone_args": {"embed_dim": 32, "depth": 1, "num_heads": 2},
}


@pytest.mark.parametrize(
    ("name", "interpolation"),
    [
        *(("NEPA", InterpolationMode.BILINEAR), ("MAE", InterpolationMode.BICUBIC)),
        *(("CPC", InterpolationMode.BILINEAR), ("IGPT", InterpolationMode.BILINEAR)),
        *(("AIM", InterpolationMode.BICUBIC), ("IJEPA", InterpolationMode.BICUBIC)),
        *((name, None) for name in ("SimCLR", "MoCoV3", "SimSiam", "BYOL", "DINO", "IBOT", "LeJEPA", "BEiT")),
    ],
)
def test_which_methods_have_one_crop_and_flip(name, interpolation):
    arguments = SMALL | ({"backbone": "nepa_vit_tiny_patch14_224"} if name in ("NEPA", "CPC", "IGPT") else {})
    arguments |= {"IJEPA": {"min_keep": 4}, "BEiT": {"min_per_block": 4}}.get(name, {})
    method = getattr(nepa_plugin.methods, name)(8, 10, **arguments)
    augmentation = crop_flip(method.train_transform())
    if interpolation is None:
        assert augmentation is None
        return
    assert augmentation.size == (64, 64) and augmentation.interpolation is interpolation
    assert augmentation.scale == tuple(method.crop_scale) and augmentation.ratio == pytest.approx((3 / 4, 4 / 3))
    assert (augmentation.hflip_prob, augmentation.mean, augmentation.std) == (
        method.hflip_prob,
        method.mean,
        method.std,
    )


def test_how_scored_images_are_resized():
    """The published ones: ViT-B's shorter side to 256, ViT-L's both sides to int(224 / 0.95) = 235."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8))

    def expected(size, box):
        resized = image.resize(size, Image.Resampling.BICUBIC).crop(box)
        return torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 127.5 - 1

    squashed = eval_transform(224, 0.95, crop_mode="squash")(image)
    torch.testing.assert_close(squashed, expected((235, 235), (6, 6, 230, 230)), atol=1e-5, rtol=0)
    centre = eval_transform(224)(image)
    torch.testing.assert_close(centre, expected((426, 256), (101, 16, 325, 240)), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="crop_mode"):
        eval_transform(crop_mode="stretch")


def test_the_parameters_are_those_given():
    augmentation = crop_flip(NEPATransform((16, 24), (0.3, 0.6), 0.25, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    assert augmentation.size == (16, 24) and augmentation.scale == (0.3, 0.6) and augmentation.hflip_prob == 0.25
    assert augmentation.mean == (0.1, 0.2, 0.3) and augmentation.std == (0.4, 0.5, 0.6)


def test_a_transform_that_does_more_has_none():
    transform = NEPATransform(16)
    transform.transform.transforms.insert(2, v2.RandomGrayscale())
    assert crop_flip(transform) is None
    nearest = NEPATransform(16)
    nearest.transform.transforms[0].interpolation = InterpolationMode.NEAREST
    assert crop_flip(nearest) is None
    assert crop_flip(lambda image: [image]) is None


def test_a_drawn_crop_is_the_one_that_the_transform_takes():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8))
    transform = NEPATransform((16, 24))
    flips = []
    for seed in range(20):
        with torch_seeded(seed):
            expected = transform(image)[0]
        with torch_seeded(seed):
            top, left, height, width, flip = crop_flip(transform).draw(40, 52)
        view = image.crop((left, top, left + width, top + height)).resize((24, 16), Image.Resampling.BILINEAR)
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view
        assert np.array_equal(np.asarray(view), ((expected + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
        flips.append(flip)
    assert 4 < sum(flips) < 16


def test_crops_are_distributed_like_torchvisions():
    """Area, aspect and position of 3,000 drawn crops against torchvision v2's own; other draws, the same law."""
    height, width, count = 390, 470, 3000
    augmentation = crop_flip(NEPATransform(224))
    reference = v2.RandomResizedCrop(224)
    with torch_seeded(1):
        ours = np.array([augmentation.draw(height, width) for _ in range(count)], dtype=float)
    with torch_seeded(2):
        params = [reference.make_params([torch.empty(3, height, width)]) for _ in range(count)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in params], dtype=float)

    def statistics(crops):
        top, left, h, w = crops[:, :4].T
        return h * w / (height * width), np.log(w / h), (top + h / 2) / height, (left + w / 2) / width

    for a, b in zip(statistics(ours), statistics(theirs), strict=True):
        assert ks_2samp(a, b).pvalue > 0.01
    narrower = crop_flip(NEPATransform(224, scale=(0.15, 1.0)))
    with torch_seeded(1):
        others = np.array([narrower.draw(height, width) for _ in range(count)], dtype=float)
    assert ks_2samp(statistics(others)[0], statistics(theirs)[0]).pvalue < 1e-6  # the test sees a difference
    assert ours[:, 4].mean() == pytest.approx(0.5, abs=0.03)
