"""Real photographs for tests: pieces of the two that come with scikit-learn."""

from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_images

#: (height, width) of the pieces, some enlarged and some reduced by a crop of 64 pixels.
SIZES = [(390, 470), (470, 390), (200, 640), (427, 90), (64, 64), (33, 50), (300, 300), (100, 140)]


def photos(count: int = 8) -> list[Image.Image]:
    """Return pieces of different places and sizes."""
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    pieces = []
    for i in range(count):
        height, width = SIZES[i % len(SIZES)]
        source = sources[i % 2].resize((640, 480))
        left, top = (i * 37) % (641 - width), (i * 53) % (481 - height)
        pieces.append(source.crop((left, top, left + width, top + height)))
    return pieces


def photo_folder(root: Path, count: int = 8, quality: int = 92) -> Path:
    """Write JPEGs in two classes and return the folder."""
    for i, piece in enumerate(photos(count)):
        folder = root / "ab"[i * 2 // count]
        folder.mkdir(parents=True, exist_ok=True)
        piece.save(folder / f"{i:03d}.jpg", quality=quality)
    return root
