"""Label maps at the resolution of the patches."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as T

from nepa_plugin.data.errors import DataError
from nepa_plugin.data.evaluation import ImageFormat


def patch_labels(path: str | Path, form: ImageFormat, grid: tuple[int, int]) -> Tensor:
    """Return the most frequent label of every patch, of the same crop as the image's.

    Args:
        path: PNG of one channel, 8 bit, the label of each pixel.
        form: How the model takes images.
        grid: (rows, columns) of its patches.

    Returns:
        Labels (rows, columns).

    Raises:
        DataError: If the file is no such map.
    """
    try:
        with Image.open(path) as image:
            labels = Image.fromarray(np.asarray(image)) if image.mode in ("L", "P") else None
    except OSError as error:
        raise DataError(f"{path} cannot be read as a label map: {error}") from error
    if labels is None:
        raise DataError(f"{path} is no 8-bit map of labels: its pixels must be one number each.")
    resize, crop, *_ = form.evaluation().transforms  # type: ignore[attr-defined]
    nearest = T.Resize(resize.size, interpolation=T.InterpolationMode.NEAREST)
    pixels = torch.from_numpy(np.array(crop(nearest(labels)))).long()
    rows, columns = grid
    patches = pixels.unflatten(0, (rows, -1)).unflatten(2, (columns, -1)).transpose(1, 2).flatten(2)
    return patches.mode(dim=-1).values
