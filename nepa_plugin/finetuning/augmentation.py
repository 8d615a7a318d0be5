"""timm's training augmentation, as it was when the recipe was published."""

from collections.abc import Iterator
from typing import Any

from PIL import Image
from timm.data import auto_augment


def posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    """Return an image with fewer bits per channel; black with none.

    timm's policies come down to no bit, in RandAugment at magnitude 10, which ``m9-mstd0.5`` draws in one of 44 cases.
    Pillow made such an image black until 12, and refuses since 13.
    """
    if bits_to_keep < 1:
        return image.point([0] * 256 * len(image.getbands()))
    return auto_augment.posterize(image, bits_to_keep, **kwargs)


def _operations(transform: Any) -> Iterator[auto_augment.AugmentOp]:
    """Yield the operations of timm's policies in a composed transform."""
    for part in transform.transforms:
        yield from getattr(part, "ops", [])  # RandAugment, AugMix
        yield from (operation for pair in getattr(part, "policy", []) for operation in pair)  # AutoAugment


def allow_black(transform: Any) -> Any:
    """Let a training transform of timm posterize with any Pillow.

    Args:
        transform: What ``timm.data.create_transform`` returns; it is changed.

    Returns:
        The transform.
    """
    for operation in _operations(transform):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = posterize
    return transform
