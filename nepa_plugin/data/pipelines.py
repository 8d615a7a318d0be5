"""From the bytes of image files to training views: by PIL, on uint8 tensors in the loader, or batched on the device.

All three draw the same crops and flips for the same (seed, epoch, index); only arithmetic differs.
"""

import io
import warnings
from collections.abc import Callable
from functools import lru_cache
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
from nepa_plugin.data.samples import SeededDataset, generators_of, sample_seed, torch_seeded
from nepa_plugin.data.tables import Table
from nepa_plugin.data.transforms import CropFlip, crop_flip
from nepa_plugin.runtime.transfer import to_device

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


@lru_cache
def _statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (3, 1, 1) on the device; torchvision copies them there for every batch."""
    first, second = (torch.tensor(values)[:, None, None].to(device) for values in (mean, std))
    return first, second


def _normalised(pixels: Tensor, augmentation: CropFlip) -> Tensor:
    """Return pixels (B, 3, H, W) from 0 to 255 as ``ToTensor`` and ``Normalize`` do, with one copy."""
    scaled = pixels.to(torch.float32, memory_format=torch.contiguous_format, copy=True).div_(255)
    mean, std = _statistics(tuple(augmentation.mean), tuple(augmentation.std), pixels.device)
    return scaled.sub_(mean).div_(std)


class PilPipeline:
    """Everything in the loader, by PIL: any method's transform.

    Args:
        transform: From a PIL image to a list of views.
    """

    collate: Callable[[list[Any]], Any] = MultiViewCollate()
    #: Whether Pillow opens every image, and so looks at its number of pixels.
    opens_with_pillow = True

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

    opens_with_pillow = False

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

    One tensor holds the bytes of all files, because every tensor that a loader process sends costs a file descriptor,
    and one the pixels of all that is decoded already, which go to the device in one copy. It has no ``to``, so that
    Lightning leaves it where it is: nvJPEG reads its input on the CPU.

    Args:
        files: Bytes of the JPEG files, one image after the other.
        pixels: Decoded pixels (3, H, W) of the other images.
        table: Per image: bytes, whether it is a JPEG file, height and width of the image, top, left, height and width
            of the crop, and whether to flip; (B, 9).
    """

    def __init__(self, files: Tensor, pixels: Tensor, table: Tensor) -> None:
        self.files = files
        self.pixels = pixels
        self.table = table

    def pin_memory(self) -> "PackedImages":
        """Pin what goes to the device; torch's loader calls this where it pins a batch."""
        return PackedImages(self.files, self.pixels.pin_memory(), self.table)

    @classmethod
    def collate(cls, samples: list[Any]) -> Any:
        """Return (packed images, labels (B,), filenames)."""
        images, labels, filenames = zip(*samples, strict=True)
        none = torch.empty(0, dtype=torch.uint8)
        files, pixels = ([data for data, row in images if row[1] == jpeg] for jpeg in (True, False))
        packed = cls(torch.cat([none, *files]), torch.cat([none, *pixels]), torch.tensor([row for _, row in images]))
        return packed, torch.tensor(labels), list(filenames)


class DevicePipeline(TensorPipeline):
    """Read files and draw crops in the loader; decode, crop, resize, flip and normalise on the device, batched.

    JPEGs are decoded by nvJPEG where the device is CUDA. What it does not decode like PIL (other formats, grey and CMYK
    JPEGs) is decoded in the loader.

    Args:
        augmentation: What to do.
    """

    collate = PackedImages.collate
    opens_with_pillow = True

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
        jpegs, decoded = ([i for i, row in enumerate(rows) if bool(row[1]) == jpeg] for jpeg in (True, False))
        files = list(views.files.split([rows[i][0] for i in jpegs]))
        parts = to_device(views.pixels, device).split([rows[i][0] for i in decoded])
        pixels = {i: part.view(3, *rows[i][2:4]) for i, part in zip(decoded, parts, strict=True)}
        pixels |= zip(jpegs, _decode_jpegs(files, device, [filenames[i] for i in jpegs]), strict=True)
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


class MaskedPipeline(PilPipeline):
    """A pipeline whose batches have a fourth part: what the method draws once per batch.

    It is drawn where the batch is put together, in a loader process, as a function of (seed, epoch) and of the batch's
    first image: processes and accumulated batches have masks of their own, and a resumed run has those it had.

    Args:
        pipeline: What to do with an image.
        draw: From a number of images to tensors, drawn from torch's global CPU generator.
    """

    def __init__(self, pipeline: PilPipeline, draw: Callable[[int], Any]) -> None:
        self.pipeline = pipeline
        self.draw = draw
        self.opens_with_pillow = pipeline.opens_with_pillow
        self.collate = self._collate

    def load(self, data: Tensor) -> Any:
        """Return what the inner pipeline does."""
        return self.pipeline.load(data)

    def view(self, image: Any, key: ViewKey) -> Any:
        """Return the image's part of a batch, and the seed of the masks if it is the first one."""
        return self.pipeline.view(image, key), sample_seed(*key, 1)

    def _collate(self, samples: list[Any]) -> Any:
        """Return (views, labels, filenames, masks)."""
        batch = self.pipeline.collate([(view, label, filename) for (view, _), label, filename in samples])
        with torch_seeded(samples[0][0][1]):
            return *batch, self.draw(len(samples))

    def finish(self, views: Any, device: torch.device, filenames: list[str]) -> list[Tensor]:
        """Return what the inner pipeline does."""
        return self.pipeline.finish(views, device, filenames)


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
            f"data.pipeline {name} is for methods whose augmentation is one random crop and flip (NEPA, CPC, IGPT, "
            f"MAE, AIM, IJEPA); {method} does more. Use --data.pipeline pil."
        )
    return {"tensor": TensorPipeline, "device": DevicePipeline}[name](augmentation)


class PipelineDataset(SeededDataset):
    """A view of a ``LightlyDataset`` whose images, read by lightly, become a pipeline's parts of a batch.

    Args:
        dataset: The images.
        pipeline: What to do with an image.
        seed: Seed of the run.
        indices: The images to use, by index into ``dataset``.
        on_bad_image: ``"error"``, or ``"skip"`` to take the next readable image instead.
    """

    def __init__(
        self, dataset: LightlyDataset, pipeline: PilPipeline, seed: int, indices: list[int], on_bad_image: str = "error"
    ) -> None:
        super().__init__(dataset, pipeline.view, seed, indices, on_bad_image)
        self.pipeline = pipeline

    def view(self, image: Any, key: ViewKey) -> Any:
        """Return the image's part of a batch; ``key`` is (seed, epoch, index)."""
        return self.pipeline.view(image, key)


class FileDataset(PipelineDataset):
    """The same for a pipeline that reads the files itself."""

    def load(self, position: int) -> tuple[Any, int, str]:
        """Return (what the pipeline loads, class index, filename) of the image at ``position`` of the dataset."""
        inner = self.dataset.dataset
        if isinstance(inner, Table):
            data, target = inner.read(position)
        else:
            path, target = inner.samples[position]
            data = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
        return self.pipeline.load(data), target, self.dataset.index_to_filename(inner, position)
