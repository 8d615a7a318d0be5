"""scikit-learn's handwritten digits: the real images that the embedded demos are made of."""

from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from nepa_plugin.data.cache import cache_dir, private_folder
from nepa_plugin.data.errors import DataError
from nepa_plugin.runtime.files import whole_folder

#: The first so many of the 1,797 digits are for training, in pretraining and in scenes; the rest are for validation.
TRAINING_DIGITS = 1400


def digit_images(size: int = 32) -> tuple[list[Image.Image], np.ndarray]:
    """Return the 1,797 scans of 8x8 pixels, upscaled, and their labels.

    Args:
        size: Side of the images in pixels.

    Returns:
        Grey images, white on black, and integer labels (1797,).
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8)) for pixels in digits.images]
    return [image.resize((size, size), Image.Resampling.BICUBIC) for image in images], digits.target


def digits_folder(root: str | Path | None = None) -> Path:
    """Write scikit-learn's handwritten digits as an image folder, once, and return it.

    1,797 real 8x8 scans, upscaled to 32x32: ``train/CLASS/*.png`` (the first 1,400) and ``val/CLASS/*.png`` (397).

    Args:
        root: Where to write; a folder ``digits`` in :func:`cache_dir` by default.

    Returns:
        The folder that holds ``train`` and ``val``.

    Raises:
        DataError: If it cannot be written.
    """
    target = Path(root) if root else cache_dir() / "digits"
    if target.is_dir():
        return target
    with suppress(OSError):
        private_folder(target.parent)
    with suppress(OSError), whole_folder(target) as part:  # another process may be first
        for i, (image, label) in enumerate(zip(*digit_images(32), strict=True)):
            folder = part / ("train" if i < TRAINING_DIGITS else "val") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{i:04d}.png")
    if not target.is_dir():
        raise DataError(f"The digits could not be written to {target}: is there room, and may you write there?")
    return target
