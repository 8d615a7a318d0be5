"""The embedded segmentation demo: scenes of handwritten digits with a class per pixel, in ADE20K's folder layout."""

from pathlib import Path

import numpy as np
from PIL import Image

from nepa_plugin.data.digits import TRAINING_DIGITS, digit_images
from nepa_plugin.runtime.files import whole_folder

#: Classes in the order of the labels 1 to 11; label 0 is void, as in ADE20K.
SCENE_CLASSES = ("background", *(f"digit {i}" for i in range(10)))
_CELL = 32  # pixels; every cell of a scene holds at most one digit


def digit_scenes(
    root: str | Path,
    num_training: int = 600,
    num_validation: int = 100,
    grid: tuple[int, int] = (1, 2),
    seed: int = 0,
) -> Path:
    """Write scenes of digits as ``images/{training,validation}/*.png`` and ``annotations/{training,validation}/*.png``.

    Each scene is a grid of cells of 32 pixels over faint noise; three of four hold a digit of 24 to 32 pixels at a
    random place, a size that pretraining on digits of 32 pixels has seen. Bright pixels have the digit's class, its
    soft border is void (label 0), all else is background. Validation scenes are made of other digits than training
    scenes and pretraining.

    Args:
        root: Folder to create.
        num_training: Number of training scenes.
        num_validation: Number of validation scenes.
        grid: Rows and columns of cells.
        seed: Seed of the composition.

    Returns:
        The folder.

    Raises:
        FileExistsError: If it exists.
    """
    target = Path(root)
    if target.exists():
        raise FileExistsError(f"{target} exists and is left as it is. Remove it or choose another folder.")
    images, labels = digit_images(_CELL)
    with whole_folder(target) as part:
        for split, count, chosen in (
            ("training", num_training, range(TRAINING_DIGITS)),
            ("validation", num_validation, range(TRAINING_DIGITS, len(images))),
        ):
            rng = np.random.default_rng([seed, chosen.start])
            for kind in ("images", "annotations"):
                (part / kind / split).mkdir(parents=True)
            own_images, own_labels = [images[j] for j in chosen], labels[chosen]
            for i in range(count):
                image, annotation = _scene(own_images, own_labels, grid, rng)
                Image.fromarray(image).convert("RGB").save(part / "images" / split / f"{i:04d}.png")
                Image.fromarray(annotation).save(part / "annotations" / split / f"{i:04d}.png")
    return target


def _scene(
    images: list[Image.Image], labels: np.ndarray, grid: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    height, width = grid[0] * _CELL, grid[1] * _CELL
    pixels = rng.integers(0, 24, (height, width), dtype=np.uint8)
    annotation = np.ones((height, width), dtype=np.uint8)
    for cell in range(grid[0] * grid[1]):
        if rng.random() >= 0.75:
            continue
        index, size = int(rng.integers(len(images))), int(rng.integers(24, _CELL + 1))
        digit = np.asarray(images[index].resize((size, size), Image.Resampling.BICUBIC))
        y, x = (k * _CELL + int(rng.integers(_CELL - size + 1)) for k in divmod(cell, grid[1]))
        place = np.s_[y : y + size, x : x + size]
        pixels[place] = np.maximum(pixels[place], digit)
        annotation[place][digit >= 64] = 0
        annotation[place][digit >= 128] = 2 + labels[index]
    return pixels, annotation
