"""The data module of fine-tuning: the same, of images with classes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from nepa_plugin.data.errors import DataError
from nepa_plugin.data.evaluation import evaluation_folders
from nepa_plugin.data.module import ImageData
from nepa_plugin.data.transforms import CropMode
from nepa_plugin.runtime.ranges import PositiveFraction, PositiveInt, check_ranges


class LabelledData(ImageData):
    """Images in one sub-folder per class.

    Args:
        folder: Folder that holds ``train`` and ``val`` (or ``test``) with a sub-folder per class in each, or
            ``"digits"`` for scikit-learn's bundled handwritten digits; in place of ``train_dir`` and ``val_dir``.
        batch_size_per_device: Images per device and forward pass.
        crop_pct: Centre crop over resized side of the scored images; by default the model's own, 1 up to 64 pixels.
        crop_mode: ``center``, or ``squash``, which resizes both sides and loses the aspect ratio, as ViT-L was scored
            when it was published (with a ``crop_pct`` of 0.95).
        **kwargs: Arguments of :class:`~nepa_plugin.data.module.ImageData`.

    Raises:
        DataError: If the images have no classes, or are not there.
    """

    def __init__(
        self,
        folder: str | None = None,
        batch_size_per_device: PositiveInt = 128,
        crop_pct: PositiveFraction | None = None,
        crop_mode: CropMode = "center",
        **kwargs: Any,
    ) -> None:
        check_ranges(LabelledData, {"crop_pct": crop_pct}, "data.")
        given = [name for name in ("train_dir", "val_dir", "train_shards", "demo") if kwargs.get(name) is not None]
        if folder is not None and given:
            raise DataError(f"data.folder and data.{given[0]} are both set: give one of them.")
        if folder == "digits":
            kwargs["demo"] = "digits"
        elif folder is not None:
            if not Path(folder).is_dir():
                raise DataError(f"--data: there is no folder {folder}.")
            train, val = evaluation_folders(folder)
            kwargs |= {"train_dir": str(train), "val_dir": str(val)}
        elif not given:
            raise DataError("No images: give --data FOLDER, which holds train/ and val/, or --data digits.")
        super().__init__(batch_size_per_device=batch_size_per_device, **kwargs)
        self.crop: tuple[float | None, CropMode] = (crop_pct, crop_mode)
        if self.num_classes == 0:
            where = kwargs.get("train_dir") or kwargs.get("train_shards")
            raise DataError(f"{where} has no classes: fine-tuning needs two sub-folders at least, one per class.")

    def eval_transform(self) -> Callable[[Image.Image], Any]:
        """Return the transform of the scored images."""
        assert self.trainer is not None
        transform: Callable[[Image.Image], Any] = self.trainer.lightning_module.eval_transform(*self.crop)
        return transform
