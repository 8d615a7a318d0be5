"""From the bytes of image files to training views: by PIL, on uint8 tensors in the loader, or batched on the device.

All three draw the same crops and flips for the same (seed, epoch, index); only arithmetic differs.
"""

import io
import warnings
from collections.abc import Callable
from typing import Any, Literal, cast

import numpy as np
import torch
import torchvision.io
from lightly.data import LightlyDataset
from lightly.data.multi_view_collate import MultiViewCollate
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from nepa_plugin.data.errors import DataError
from nepa_plugin.data.files import IMAGE_ERRORS
from nepa_plugin.data.resample import resize_crops
from nepa_plugin.data.samples import SeededDataset, generators_of, torch_seeded
from nepa_plugin.data.transforms import CropFlip, crop_flip

PipelineName = Literal["pil", "tensor", "device"]
ViewKey = tuple[int, int, int]  # (seed, epoch, index)
JPEG_START = [0xFF, 0xD8]


def decode(data: Tensor) -> Tensor:
    """Decode an image file to the pixels that PIL's ``convert("RGB")`` gives; EXIF orientation is ignored.

    JPEGs of one or three channels go through torchvision, everything else through PIL.

    Args:
        data: The file's bytes, (N,) of uint8.

    Returns:
        Pixels (3, H, W) of uint8; of any strides.

    Raises:
        OSError, SyntaxError, ValueError: From PIL, if it is no readable image.
    """
    if data[:2].tolist() == JPEG_START:
        try:
            pixels: Tensor = torchvision.io.decode_jpeg(data)
        except RuntimeError:  # PIL reads it or says what is wrong
            pass
        else:
            if len(pixels) in (1, 3):  # four are CMYK, which PIL converts in its own way
                return pixels.expand(3, -1, -1)
    with Image.open(_file(data)) as image:
        return F.pil_to_tensor(image.convert("RGB"))


def _file(data: Tensor) -> io.BytesIO:
    return io.BytesIO(data.numpy().tobytes())


def _normalised(pixels: Tensor, augmentation: CropFlip) -> Tensor:
    """Return pixels (B, 3, H, W) from 0 to 255 as ``ToTensor`` and ``Normalize`` do, with one copy."""
    scaled = pixels.to(torch.float32, memory_format=torch.contiguous_format, copy=True).div_(255)
    return F.normalize(scaled, list(augmentation.mean), list(augmentation.std), inplace=True)


class PilPipeline:
    """Everything in the loader, by PIL: any method's transform.

    Args:
        transform: From a PIL image to a list of views.
    """

    collate: Callable[[list[Any]], Any] = MultiViewCollate()

    def __init__(self, transform: Callable[[Image.Image], list[Tensor]]) -> None:
        self.transform = transform
        self.seeded = generators_of(transform)

    def load(self, data: Tensor) -> Any:
        """Return the image in a file's bytes (N,)."""
        with Image.open(_file(data)) as image:
            return image.convert("RGB")

    def view(self, image: Any, key: ViewKey) -> Any:
        """Return the image's part of a batch; ``key`` is (seed, epoch, index)."""
        with self.seeded(*key):
            return self.transform(image)

    def finish(self, views: Any, device: torch.device, filenames: list[str]) -> list[Tensor]:
        """Return the views of a batch, float and normalised, (B, 3, H, W) each, on the device."""
        return cast(list[Tensor], views)


class TensorPipeline(PilPipeline):
    """Decode, crop, resize and flip uint8 tensors in the loader; normalise on the device.

    torchvision's decoder knows no bound of an image's pixels, so what is decoded should have been looked at before.

    Args:
        augmentation: What to do.
    """

    def __init__(self, augmentation: CropFlip) -> None:
        self.augmentation = augmentation

    def load(self, data: Tensor) -> Any:
        """Return the pixels (3, H, W) in a file's bytes (N,)."""
        return decode(data)

    def view(self, image: Any, key: ViewKey) -> Any:
        """Return a list with the one view (3, H, W) of uint8."""
        with torch_seeded(*key):
            *box, flip = self.augmentation.draw(*image.shape[1:])
        size, interpolation = list(self.augmentation.size), self.augmentation.interpolation
        view = F.resized_crop(image, *box, size, interpolation, antialias=True)
        return [F.horizontal_flip(view) if flip else view]

    def finish(self, views: Any, device: torch.device, filenames: list[str]) -> list[Tensor]:
        """Normalise a list with the one view (B, 3, H, W) of uint8."""
        return [_normalised(views[0], self.augmentation)]


class PackedImages:
    """A batch of image files on its way from the loader to the device.

    One tensor holds all the bytes, because every tensor that a loader process sends costs a file descriptor. It has no
    ``to``, so that Lightning leaves it where it is: nvJPEG reads its input on the CPU.

    Args:
        data: Bytes of files, or of decoded pixels (3, H, W), one image after the other.
        table: Per image: bytes, whether it is a JPEG file, height and width of the image, top, left, height and width
            of the crop, and whether to flip; (B, 9).
    """

    def __init__(self, data: Tensor, table: Tensor) -> None:
        self.data = data
        self.table = table

    @classmethod
    def collate(cls, samples: list[Any]) -> Any:
        """Return (packed images, labels (B,), filenames)."""
        images, labels, filenames = zip(*samples, strict=True)
        packed = cls(torch.cat([data for data, _ in images]), torch.tensor([row for _, row in images]))
        return packed, torch.tensor(labels), list(filenames)


class DevicePipeline(TensorPipeline):
    """Read files and draw crops in the loader; decode, crop, resize, flip and normalise on the device, batched.

    JPEGs are decoded by nvJPEG where the device is CUDA. What it does not decode like PIL (other formats, grey and CMYK
    JPEGs) is decoded in the loader.

    Args:
        augmentation: What to do.
    """

    collate = PackedImages.collate

    def load(self, data: Tensor) -> Any:
        """Return a file's bytes (N,), whether it is a JPEG, and the image's height and width in pixels."""
        with Image.open(_file(data)) as image:  # reads the header only
            if image.mode == "RGB" and data[:2].tolist() == JPEG_START:
                return data, True, image.height, image.width
        pixels = decode(data)
        return pixels.flatten(), False, *pixels.shape[1:]

    def view(self, image: Any, key: ViewKey) -> Any:
        """Return the bytes and their row of :class:`PackedImages`' table."""
        data, is_jpeg, height, width = image
        with torch_seeded(*key):
            crop = self.augmentation.draw(height, width)
        return data, [len(data), is_jpeg, height, width, *crop]

    def finish(self, views: Any, device: torch.device, filenames: list[str]) -> list[Tensor]:
        """Return a list with the one view (B, 3, H, W) of packed images.

        Raises:
            DataError: If a file's header is readable and its pixels are not.
        """
        rows = views.table.tolist()
        data = views.data.split(views.table[:, 0].tolist())
        jpegs = [i for i, row in enumerate(rows) if row[1]]
        pixels = {i: data[i].view(3, *rows[i][2:4]).to(device) for i in range(len(rows)) if not rows[i][1]}
        pixels |= zip(
            jpegs, _decode_jpegs([data[i] for i in jpegs], device, [filenames[i] for i in jpegs]), strict=True
        )
        crops = []
        for i, (*_, top, left, height, width, _) in enumerate(rows):
            crops.append(pixels[i][:, top : top + height, left : left + width])
        augmentation = self.augmentation
        resized = resize_crops(crops, views.table[:, -1].bool(), augmentation.size, augmentation.interpolation)
        return [_normalised(resized, augmentation)]


def _decode_jpegs(data: list[Tensor], device: torch.device, names: list[str]) -> list[Tensor]:
    if device.type == "cuda" and data:
        try:
            return cast(list[Tensor], torchvision.io.decode_jpeg(data, torchvision.io.ImageReadMode.RGB, device))
        except RuntimeError as error:  # one of the images, or the decoder itself
            warnings.warn(f"nvJPEG failed on a batch, which the CPU decodes instead: {error}", stacklevel=1)
    decoded = []
    for image, name in zip(data, names, strict=True):
        try:
            decoded.append(decode(image).to(device))
        except IMAGE_ERRORS as error:
            raise DataError(f"{name} cannot be read: {error}") from error
    return decoded


def build_pipeline(name: PipelineName, transform: Callable[[Image.Image], list[Tensor]], method: str) -> PilPipeline:
    """Return the pipeline of a name.

    Args:
        name: ``"pil"``, ``"tensor"`` or ``"device"``.
        transform: The method's augmentation.
        method: What to call the method in an error.

    Returns:
        The pipeline.

    Raises:
        DataError: If the augmentation is more than a crop, flip and normalisation, which is all that the fast ones do.
    """
    if name == "pil":
        return PilPipeline(transform)
    augmentation = crop_flip(transform)
    if augmentation is None:
        raise DataError(
            f"data.pipeline {name} is for methods whose augmentation is one random crop and flip (NEPA, MAE, AIM, "
            f"IJEPA); {method} does more. Use --data.pipeline pil."
        )
    return {"tensor": TensorPipeline, "device": DevicePipeline}[name](augmentation)


class FileDataset(SeededDataset):
    """A view of a ``LightlyDataset`` whose files go through a pipeline instead of lightly's loader and a transform.

    Args:
        dataset: The images.
        pipeline: What to do with a file.
        seed: Seed of the run.
        indices: The images to use, by index into ``dataset``.
        on_bad_image: ``"error"``, or ``"skip"`` to take the next readable image instead.
    """

    def __init__(
        self, dataset: LightlyDataset, pipeline: PilPipeline, seed: int, indices: list[int], on_bad_image: str = "error"
    ) -> None:
        super().__init__(dataset, pipeline.view, seed, indices, on_bad_image)
        self.pipeline = pipeline

    def load(self, position: int) -> tuple[Any, int, str]:
        """Return (what the pipeline loads, class index, filename) of the image at ``position`` of the dataset."""
        path, target = self.dataset.dataset.samples[position]
        data = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
        return self.pipeline.load(data), target, self.dataset.index_to_filename(self.dataset.dataset, position)

    def view(self, image: Any, key: ViewKey) -> Any:
        """Return the image's part of a batch; ``key`` is (seed, epoch, index)."""
        return self.pipeline.view(image, key)
