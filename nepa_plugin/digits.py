"""scikit-learn's handwritten digits: the real images that the embedded demos are made of."""

import numpy as np
from PIL import Image

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
