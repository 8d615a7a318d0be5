"""Images in: the data module, the transforms, and the embedded demo images.

Every random choice about a sample (its place in the epoch, its crop, its flip) is a function of (seed, epoch, index).
A resumed run therefore sees exactly what an uninterrupted one sees, whatever the number of workers.
"""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from lightly.data import LightlyDataset
from lightly.data.multi_view_collate import MultiViewCollate
from PIL import Image, UnidentifiedImageError
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader

from nepa_plugin.digits import TRAINING_DIGITS, digit_images
from nepa_plugin.samples import DataError as DataError
from nepa_plugin.samples import EpochBatchSampler as EpochBatchSampler
from nepa_plugin.samples import ResumableLoader as ResumableLoader
from nepa_plugin.samples import SeededDataset as SeededDataset
from nepa_plugin.transforms import NEPATransform as NEPATransform
from nepa_plugin.transforms import eval_transform as eval_transform

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


# -- the embedded images -----------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """Return the folder for derived data: ``$NEPA_PLUGIN_CACHE``, by default ``~/.cache/nepa_plugin``."""
    return Path(os.environ.get("NEPA_PLUGIN_CACHE") or Path.home() / ".cache" / "nepa_plugin")


def digits_folder(root: str | Path | None = None) -> Path:
    """Write scikit-learn's handwritten digits as an image folder, once, and return it.

    1,797 real 8x8 scans, upscaled to 32x32: ``train/CLASS/*.png`` (the first 1,400) and ``val/CLASS/*.png`` (397).

    Args:
        root: Where to write; a folder ``digits`` in :func:`cache_dir` by default.

    Returns:
        The folder that holds ``train`` and ``val``.
    """
    target = Path(root) if root else cache_dir() / "digits"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(dir=target.parent, prefix=".digits-"))
    for i, (image, label) in enumerate(zip(*digit_images(32), strict=True)):
        folder = tmp / ("train" if i < TRAINING_DIGITS else "val") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i:04d}.png")
    try:
        tmp.rename(target)  # atomic: another process may be doing the same
    except OSError:
        shutil.rmtree(tmp)
    return target


# -- checking files ----------------------------------------------------------------------------------------------------


def _is_bad_image(path: str) -> bool:
    """Whether a file is no readable image. Decodes it only if the end of the file looks cut off."""
    try:
        with open(path, "rb") as file:
            head = file.read(4)
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 16))
            tail = file.read()
        complete = (head[:2] == b"\xff\xd8" and b"\xff\xd9" in tail) or (head == b"\x89PNG" and b"IEND" in tail)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:  # parses the header
                if not complete:
                    image.load()
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
        return True
    return False


def find_bad_images(root: str | Path, files: list[str]) -> list[str]:
    """Return those of ``files`` (relative to ``root``) that cannot be read as images.

    The result is kept in :func:`cache_dir` and reused as long as names, sizes and times of the files are the same.

    Args:
        root: The image folder.
        files: Paths relative to it.

    Returns:
        The unreadable ones, in order.
    """
    root = Path(root).resolve()
    signature, record = files_signature(root, files), _check_record(root)
    if record.is_file():
        known = json.loads(record.read_text())
        if known["signature"] == signature:
            return list(known["bad"])
    with _file_threads() as pool:
        flags = pool.map(lambda file: _is_bad_image(str(root / file)), files)
        bad = [file for file, is_bad in zip(files, flags, strict=True) if is_bad]
    record.parent.mkdir(parents=True, exist_ok=True)
    tmp = record.with_suffix(f".{os.getpid()}")
    tmp.write_text(json.dumps({"root": str(root), "signature": signature, "bad": bad}))
    tmp.replace(record)
    return bad


def files_signature(root: str | Path, files: list[str], times: bool = True) -> str:
    """Return a SHA-256 of files' names and sizes and, unless ``times`` is off, of when they were changed."""
    root = Path(root)

    def stat(file: str) -> tuple[str | int, ...]:
        info = (root / file).stat()
        return (file, info.st_size, info.st_mtime_ns) if times else (file, info.st_size)

    with _file_threads() as pool:
        return hashlib.sha256(repr(list(pool.map(stat, files))).encode()).hexdigest()


def _file_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1)))


def fingerprint(images: LightlyDataset) -> str:
    """Return a hash of the names and sizes of a dataset's files: equal for copies, different for other images."""
    return files_signature(images.input_dir or ".", sorted(images.get_filenames()), times=False)[:16]


def _check_record(root: Path) -> Path:
    return cache_dir() / "checked" / (hashlib.sha256(str(root).encode()).hexdigest()[:24] + ".json")


def image_folder(root: str | Path, what: str = "data.train_dir") -> LightlyDataset:
    """Open an image folder as lightly reads it: with a sub-folder per class, or flat.

    Args:
        root: The folder.
        what: What to call the folder's option in an error.

    Returns:
        The dataset of (image, class index, filename).

    Raises:
        DataError: If the folder is missing or holds no image.
    """
    path = Path(root)
    if not path.is_dir():
        raise DataError(f"{what}: no folder at {path}. Give a folder of images, with one sub-folder per class or flat.")
    if not any(f.lower().endswith(IMAGE_EXTENSIONS) for _, _, files in os.walk(path) for f in files):
        raise DataError(f"{what}: {path} holds no image. Known extensions: {', '.join(IMAGE_EXTENSIONS)}.")
    try:
        return LightlyDataset(str(path))
    except (FileNotFoundError, RuntimeError) as error:
        raise DataError(f"{what}: {path} cannot be read as an image folder: {error}") from error


def loader_workers(num_workers: int | None, processes: int) -> int:
    """Return the loader processes of each of ``processes`` here: what is given, else their share of the cores."""
    if num_workers is not None:
        return num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if cores <= 2 else min(16, cores // max(1, processes))


def trained_batches(trainer: Any) -> int:
    """Return how many batches a run has been trained on, over all epochs and restarts."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)


class ImageData(LightningDataModule):
    """Folders of images for any of the methods, read by lightly.

    Args:
        train_dir: Folder of training images: one sub-folder per class (ImageNet style), or flat (no labels).
        val_dir: Folder of validation images for the online probe, with the same classes. Optional.
        demo: ``"digits"`` uses scikit-learn's bundled handwritten digits instead of folders.
        batch_size_per_device: Images per device and forward pass.
        num_workers: Loader processes per device; by default the cores divided by the devices on this machine, at most
            16, and none where there are two cores or fewer.
        crop_pct: Centre crop over resized side of the validation images.
        on_bad_image: ``"error"`` stops before training if a file is no readable image; ``"skip"`` leaves such files
            out and counts them.
        seed: Seed of the order and the augmentation; the command sets it to ``seed_everything``.
    """

    def __init__(
        self,
        train_dir: str | None = None,
        val_dir: str | None = None,
        demo: Literal["digits"] | None = None,
        batch_size_per_device: int = 256,
        num_workers: int | None = None,
        crop_pct: float = 0.875,
        on_bad_image: Literal["error", "skip"] = "error",
        seed: int = 1337,
    ) -> None:
        super().__init__()
        if train_dir is None and demo is None:
            raise DataError("data.train_dir is not set: give a folder of images, or --data.demo digits.")
        if batch_size_per_device < 1:
            raise DataError(f"data.batch_size_per_device must be positive, got {batch_size_per_device}.")
        if train_dir is None:
            folder = digits_folder()
            train_dir, val_dir = str(folder / "train"), str(folder / "val")
        self.batch_size_per_device = batch_size_per_device
        self.num_workers = num_workers
        self.crop_pct = crop_pct
        self.on_bad_image = on_bad_image
        self.seed = seed
        self.train_images = image_folder(train_dir, "data.train_dir")
        self.val_images = image_folder(val_dir, "data.val_dir") if val_dir else None
        self._indices: dict[int, list[int]] = {}
        classes, val_classes = _classes(self.train_images), _classes(self.val_images)
        if val_classes and classes != val_classes:
            odd = sorted(set(classes) ^ set(val_classes))[:6]
            raise DataError(
                f"data.val_dir has other classes than data.train_dir: {', '.join(odd)} only in one of them."
            )
        #: Number of classes; 0 where the folder has no labels.
        self.num_classes = len(classes) if len(classes) > 1 else 0

    def check_images(self) -> int:
        """Find unreadable files before anything long starts.

        Returns:
            How many are skipped.

        Raises:
            DataError: If there are any and ``on_bad_image`` is ``"error"``, or if no image is left.
        """
        skipped = 0
        for images in (self.train_images, self.val_images):
            if images is None:
                continue
            files = images.get_filenames()
            bad = set(find_bad_images(images.input_dir, files))
            if bad and self.on_bad_image == "error":
                names = ", ".join(str(Path(images.input_dir) / f) for f in sorted(bad)[:5])
                raise DataError(
                    f"{len(bad)} file(s) cannot be read as images: {names}{' ...' if len(bad) > 5 else ''}. Remove or "
                    "repair them, or pass --data.on_bad_image skip."
                )
            self._indices[id(images)] = [i for i, file in enumerate(files) if file not in bad]
            if not self._indices[id(images)]:
                raise DataError(f"{images.input_dir} holds no readable image.")
            skipped += len(bad)
        return skipped

    def check_batch(self, world_size: int) -> None:
        """Check that there are enough images for one batch.

        Args:
            world_size: Number of devices.

        Raises:
            DataError: If there are not.
        """
        used = len(self._indices[id(self.train_images)])
        if used < self.batch_size_per_device * world_size:
            raise DataError(
                f"{used} images are fewer than one batch of {self.batch_size_per_device} on {world_size} device(s); "
                "lower --data.batch_size_per_device (and --global_batch_size)."
            )

    def setup(self, stage: str) -> None:
        """Learn which images are used; the record of rank zero's check makes this quick on the others."""
        if not self._indices:
            self.check_images()
        self.check_batch(self.trainer.world_size if self.trainer else 1)

    def _workers(self) -> int:
        return loader_workers(self.num_workers, self.trainer.num_devices if self.trainer else 1)

    def _dataset(self, images: LightlyDataset, transform: Callable[[Image.Image], Any]) -> SeededDataset:
        return SeededDataset(images, transform, self.seed, self._indices[id(images)], self.on_bad_image)

    def _position(self, length: int) -> tuple[int, int]:
        """Return (epoch, batch) to go on at. Lightning's count of finished batches survives every kind of restart."""
        assert self.trainer is not None
        limit = self.trainer.limit_train_batches
        length = min(length, limit) if isinstance(limit, int) else int(length * limit)
        return divmod(trained_batches(self.trainer), max(1, length))

    def train_dataloader(self) -> ResumableLoader:
        """Return batches of (views, labels, filenames), as lightly's methods take them."""
        assert self.trainer is not None
        workers = self._workers()
        dataset = self._dataset(self.train_images, self.trainer.lightning_module.train_transform())
        sampler = EpochBatchSampler(
            len(dataset),
            self.batch_size_per_device,
            self.seed,
            self.trainer.global_rank,
            self.trainer.world_size,
            self._position,
        )
        return ResumableLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=MultiViewCollate(),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return batches of (images, labels, filenames); every image once, whatever the number of processes."""
        if self.val_images is None or self.num_classes == 0:
            return []
        assert self.trainer is not None
        transform = self.trainer.lightning_module.eval_transform(self.crop_pct)
        dataset = self._dataset(self.val_images, transform)
        dataset.indices = dataset.indices[self.trainer.global_rank :: self.trainer.world_size]
        workers = self._workers()
        return DataLoader(
            dataset,
            batch_size=self.batch_size_per_device,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def evaluation_folders(source: str | Path) -> tuple[Path, Path]:
    """Return the folders of training and validation images; ``test`` is taken where there is no ``val``."""
    root = digits_folder() if str(source) == "digits" else Path(source)
    val = root / "test" if (root / "test").is_dir() and not (root / "val").is_dir() else root / "val"
    return root / "train", val


def evaluation_images(source: str | Path) -> tuple[LightlyDataset, LightlyDataset]:
    """Open labelled training and validation images.

    Args:
        source: ``"digits"`` for the embedded images, or a folder that holds ``train`` and ``val`` (or ``test``).

    Returns:
        The training and the validation images, of the same classes.

    Raises:
        DataError: If a folder is missing, holds no image, has no or one class, or the two have different classes.
    """
    folders = evaluation_folders(source)
    train, val = image_folder(folders[0], "training images"), image_folder(folders[1], "validation images")
    classes, val_classes = _classes(train), _classes(val)
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


def image_size(model: Any) -> tuple[int, int]:
    """Return the (height, width) in pixels of the images that a timm model takes."""
    size = getattr(model.patch_embed, "img_size", None) or model.pretrained_cfg["input_size"][-2:]
    return int(size[0]), int(size[1])


def evaluation_crop(model: Any, crop_pct: float | None = None) -> float:
    """Return the centre crop over resized side: what is given, else the model's own, 1 up to 64 pixels."""
    if crop_pct is not None:
        return crop_pct
    return 1.0 if max(image_size(model)) <= 64 else float(model.pretrained_cfg["crop_pct"])


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


def _classes(images: LightlyDataset | None) -> list[str]:
    return list(getattr(images.dataset, "classes", [])) if images is not None else []
