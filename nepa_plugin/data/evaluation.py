"""Labelled images to score a backbone on, prepared in the backbone's own size and normalisation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightly.data import LightlyDataset
from torch.utils.data import DataLoader

from nepa_plugin.data.digits import digits_folder
from nepa_plugin.data.errors import DataError
from nepa_plugin.data.files import MAX_PIXELS, class_names
from nepa_plugin.data.samples import SeededDataset
from nepa_plugin.data.tables import TRAIN, VAL, open_images, table_splits
from nepa_plugin.data.transforms import CropMode, NEPATransform, eval_transform


def evaluation_folders(source: str | Path) -> tuple[Path, Path]:
    """Return the folders of training and validation images; ``test`` is taken where there is no ``val``.

    Both are the folder itself where it is a table with splits.

    Raises:
        DataError: If it is a table without both splits.
    """
    root = digits_folder() if str(source) == "digits" else Path(source)
    if splits := table_splits(root):
        if not set(TRAIN) & set(splits) or not set(VAL) & set(splits):
            found = ", ".join(name for name in splits if name) or "none"
            raise DataError(f"{root}: this table needs the splits train and validation, but has {found}.")
        return root, root
    val = root / "test" if (root / "test").is_dir() and not (root / "val").is_dir() else root / "val"
    return root / "train", val


def evaluation_images(source: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[LightlyDataset, LightlyDataset]:
    """Open labelled training and validation images.

    Args:
        source: ``"digits"`` for the embedded images, a folder that holds ``train`` and ``val`` (or ``test``), or a
            table with such splits (:mod:`~nepa_plugin.data.tables`).
        max_pixels: The most pixels that an image may have.

    Returns:
        The training and the validation images, of the same classes.

    Raises:
        DataError: If a folder is missing, holds no image, has no or one class, or the two have different classes.
    """
    folders = evaluation_folders(source)
    train = open_images(folders[0], "training images", max_pixels)
    val = open_images(folders[1], "validation images", max_pixels, VAL)
    classes, val_classes = class_names(train), class_names(val)
    if not classes:
        raise DataError(f"{folders[0]} has no classes: evaluation needs one sub-folder per class.")
    if len(classes) < 2:
        raise DataError(f"{folders[0]} has one class only, {classes[0]}: evaluation needs a sub-folder per class.")
    if classes != val_classes:
        odd = sorted(set(classes) ^ set(val_classes))
        raise DataError(
            f"{folders[0]} and {folders[1]} have different classes: {', '.join(odd[:6])}"
            f"{' and others' if len(odd) > 6 else ''} only in one of them."
        )
    return train, val


def spread(length: int, number: int) -> range:
    """Return so many indices of a dataset, or all, evenly from its first on: over its classes, which stand in order."""
    return range(0, length, max(1, length // number))[:number]


def image_size(model: Any) -> tuple[int, int]:
    """Return the (height, width) in pixels of the images that a timm model takes."""
    size = getattr(model.patch_embed, "img_size", None) or model.pretrained_cfg["input_size"][-2:]
    return int(size[0]), int(size[1])


def evaluation_crop(model: Any, crop_pct: float | None = None) -> float:
    """Return the centre crop over resized side: what is given, else the model's own, 1 up to 64 pixels."""
    if crop_pct is not None:
        return crop_pct
    return 1.0 if max(image_size(model)) <= 64 else float(model.pretrained_cfg["crop_pct"])


@dataclass(frozen=True)
class ImageFormat:
    """How a model takes images: size in pixels, normalisation, centre crop over resized side, and how it is resized."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    crop_mode: CropMode = "center"

    @classmethod
    def of(cls, model: Any, crop_pct: float | None = None, crop_mode: CropMode = "center") -> "ImageFormat":
        """Return a timm model's format; ``crop_pct`` overrides its own, which is 1 up to 64 pixels."""
        config, crop = model.pretrained_cfg, evaluation_crop(model, crop_pct)
        return cls(image_size(model), tuple(config["mean"]), tuple(config["std"]), crop, crop_mode)

    def evaluation(self) -> Callable[..., Any]:
        """Return the transform without augmentation."""
        return eval_transform(self.size, self.crop_pct, self.mean, self.std, self.crop_mode)

    def random_crop(self, scale: Sequence[float], hflip: float) -> Callable[..., Any]:
        """Return the linear probe's augmentation, which is NEPA's too: random resized crop and flip."""
        return NEPATransform(self.size, tuple(scale), hflip, self.mean, self.std).transform  # type: ignore[arg-type]


def evaluation_loaders(
    source: str | Path, model: Any, batch_size: int = 256, crop_pct: float | None = None
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return loaders of training and validation images without augmentation, in the model's size and normalisation.

    Args:
        source: ``"digits"`` for the embedded images, or a folder that holds ``train`` and ``val`` (or ``test``).
        model: A timm model; its ``pretrained_cfg`` says how images are normalised.
        batch_size: Images per batch.
        crop_pct: Centre crop over resized side; by default the model's own, 1 for images of 64 pixels and less.

    Returns:
        Two loaders of (images, labels, filenames).

    Raises:
        DataError: If a folder is missing, holds no image, or has no or other classes.
    """
    images, config = evaluation_images(source), model.pretrained_cfg
    transform = eval_transform(image_size(model), evaluation_crop(model, crop_pct), config["mean"], config["std"])
    train_set, val_set = (SeededDataset(d, transform, 0, list(range(len(d)))) for d in images)
    return DataLoader(train_set, batch_size=batch_size), DataLoader(val_set, batch_size=batch_size)
