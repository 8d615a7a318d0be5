import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from nepa_plugin.data.evaluation import ImageFormat
from nepa_plugin.finetuning import Recipe
from nepa_plugin.finetuning.augmentation import posterize

FORM = ImageFormat((32, 32), (0.5,) * 3, (0.5,) * 3, 1.0)


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))


def test_no_bit_is_black_and_the_rest_is_timms(image):
    assert posterize(image, 0).getextrema() == ((0, 0),) * 3 and posterize(image, 0).size == image.size
    assert posterize(image.convert("L"), 0).getextrema() == (0, 0)
    for bits in (1, 3, 8):
        assert np.array_equal(posterize(image, bits), auto_augment.posterize(image, bits))
    assert np.array_equal(posterize(image, 3), np.asarray(image) & 0b11100000)


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m10-n4-inc1", "rand-m10-n4", "original", "v0r", "augmix-m10-w3"]
)
def test_every_policy_goes_through_hundreds_of_images(policy, image):
    """With magnitudes at the end of their range: Pillow 13 refuses what timm's policies ask for."""
    transform = Recipe(auto_augment=policy).transform(FORM)
    for seed in range(300):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        view = transform(image)
        assert view.shape == (3, 32, 32) and view.isfinite().all()
