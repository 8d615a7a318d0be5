"""The augmentation of training images and the preparation of evaluation images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_type_hints

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as T

from nepa_plugin.predictor import NEPA_MEAN, NEPA_STD
from nepa_plugin.runtime.ranges import (
    Fraction,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Range,
    Scale,
    check_hints,
    check_ranges,
)

Finite = Annotated[float, Range()]


class NEPATransform:
    """The published pretraining augmentation: one view by random resized crop and horizontal flip.

    Source: RandomResizedCrop with torchvision's default scale, bilinear, flip, mean = std = 0.5 (arXiv 2512.16922).

    Args:
        input_size: Side of the view in pixels, or (height, width); the crop's aspect ratio is drawn about the view's.
        scale: Range of the crop's area as a fraction of the image.
        hflip_prob: Probability of a horizontal flip.
        mean: Per-channel mean to subtract, for values in [0, 1].
        std: Per-channel standard deviation to divide by.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(
        self,
        input_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 224,
        scale: Scale = (0.08, 1.0),
        hflip_prob: Fraction = 0.5,
        mean: tuple[Finite, ...] = NEPA_MEAN,
        std: tuple[PositiveFloat, ...] = NEPA_STD,
    ) -> None:
        check_ranges(NEPATransform, dict(locals()))
        size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        aspect = size[1] / size[0]
        ratio = (aspect * 3 / 4, aspect * 4 / 3)
        self.transform = T.Compose(
            [
                T.RandomResizedCrop(size, tuple(scale), ratio, interpolation=T.InterpolationMode.BILINEAR),
                T.RandomHorizontalFlip(hflip_prob),
                T.ToTensor(),
                T.Normalize(mean, std),
            ]
        )

    def __call__(self, image: Image.Image) -> list[Tensor]:
        """Return a list with the one view (3, H, W), as lightly's transforms do."""
        return [self.transform(image)]


CropMode = Literal["center", "squash"]


def eval_transform(
    input_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 224,
    crop_pct: PositiveFraction = 0.875,
    mean: tuple[Finite, ...] = NEPA_MEAN,
    std: tuple[PositiveFloat, ...] = NEPA_STD,
    crop_mode: CropMode = "center",
) -> Callable[[Image.Image], Tensor]:
    """Return the evaluation transform: resize, centre crop, normalise.

    Args:
        input_size: Side of the crop in pixels, or (height, width).
        crop_pct: Crop over resized side; 0.875 gives the usual 256 -> 224.
        mean: Per-channel mean.
        std: Per-channel standard deviation.
        crop_mode: ``"center"`` resizes the shorter side to the larger side of the crop over ``crop_pct``; ``"squash"``
            resizes both sides, so that the aspect ratio is lost and nothing but the border is cut: 0.95 gives the
            published 235x235 -> 224 of ViT-L.

    Returns:
        A function from a PIL image to a tensor (3, H, W).

    Raises:
        ValueError: If a number is out of its range.
    """
    check_hints(get_type_hints(eval_transform, include_extras=True), dict(locals()))
    if crop_mode not in ("center", "squash"):
        raise ValueError(f"crop_mode={crop_mode!r} is neither 'center' nor 'squash'.")
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    squashed = [int(side / crop_pct) for side in size]
    return T.Compose(
        [
            T.Resize(
                squashed if crop_mode == "squash" else round(max(size) / crop_pct),
                interpolation=T.InterpolationMode.BICUBIC,
            ),
            T.CenterCrop(size),
            T.ToTensor(),
            T.Normalize(mean, std),
        ]
    )


@dataclass(frozen=True)
class CropFlip:
    """The parameters of an augmentation that is one random resized crop, horizontal flip and normalisation.

    Attributes:
        size: (height, width) of the view in pixels.
        scale: Range of the crop's area as a fraction of the image.
        ratio: Range of the crop's width over its height.
        interpolation: Bilinear or bicubic.
        hflip_prob: Probability of a horizontal flip.
        mean: Per-channel mean to subtract, for values in [0, 1].
        std: Per-channel standard deviation to divide by.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    interpolation: T.InterpolationMode
    hflip_prob: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def draw(self, height: int, width: int) -> tuple[int, int, int, int, bool]:
        """Draw a crop and a flip from torch's global generator, exactly as torchvision's transforms do.

        Args:
            height: Height of the image in pixels.
            width: Width of the image in pixels.

        Returns:
            Top, left, height and width of the crop in pixels, and whether to flip.
        """
        shape = torch.empty(1).expand(3, height, width)  # get_params looks at the shape only
        top, left, h, w = T.RandomResizedCrop.get_params(shape, list(self.scale), list(self.ratio))
        return top, left, h, w, bool(torch.rand(1) < self.hflip_prob)


def crop_flip(transform: Any) -> CropFlip | None:
    """Return the parameters of a transform that makes one view by crop, flip and normalisation, as NEPA's does.

    Args:
        transform: An augmentation of a method; its ``transform`` is a ``Compose`` of torchvision, v1 or v2.

    Returns:
        The parameters, or ``None`` if the transform does anything else.
    """
    steps = getattr(getattr(transform, "transform", None), "transforms", [])
    expected = ["RandomResizedCrop", "RandomHorizontalFlip", "ToTensor", "Normalize"]
    if [type(step).__name__ for step in steps] != expected:
        return None
    crop, flip, _, normalize = steps
    if crop.interpolation not in (T.InterpolationMode.BILINEAR, T.InterpolationMode.BICUBIC):
        return None
    return CropFlip(
        (crop.size[0], crop.size[-1]),
        (crop.scale[0], crop.scale[1]),
        (crop.ratio[0], crop.ratio[1]),
        crop.interpolation,
        flip.p,
        tuple(normalize.mean),
        tuple(normalize.std),
    )
