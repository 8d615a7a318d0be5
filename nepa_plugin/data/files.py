"""Image folders: opening them, finding unreadable files, and telling whether two folders hold the same images."""

import hashlib
import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lightly.data import LightlyDataset
from PIL import Image, UnidentifiedImageError

from nepa_plugin.data.cache import cache_dir
from nepa_plugin.data.errors import DataError
from nepa_plugin.runtime.files import write_json

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


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
    write_json(record, {"root": str(root), "signature": signature, "bad": bad})
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


def class_names(images: LightlyDataset | None) -> list[str]:
    """Return the names of the classes in order of their index; none for a flat folder, or no images."""
    return list(getattr(images.dataset, "classes", [])) if images is not None else []
