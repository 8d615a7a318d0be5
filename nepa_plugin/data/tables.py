"""Tables of images as Hugging Face's ``datasets`` keeps them on disk: arrow folders and parquet files.

What is read: a folder that ``save_to_disk`` wrote, of one split or of several; and a folder of ``.parquet`` or
``.arrow`` files, or with them in ``data/``, named as on the hub and in its cache, such as
``train-00000-of-00294.parquet``.
"""

import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from lightly.data import LightlyDataset
from PIL import Image
from torch import Tensor

from nepa_plugin.data.cache import cache_dir
from nepa_plugin.data.errors import DataError
from nepa_plugin.data.files import MAX_PIXELS, Check, examine, files_signature, image_folder, kept_check

#: What the splits are called, and how they are looked for.
TRAIN, VAL = ("train",), ("validation", "val", "test")
_SUFFIXES = (".parquet", ".arrow")
_SPLIT_IN_NAME = re.compile(r"(?:^|-)(train|validation|val|test)-\d+-of-\d+\.(?:parquet|arrow)$")


def table_splits(root: str | Path) -> dict[str, list[Path]]:
    """Return the files of each split in a folder; of a table that names no split, under ``""``.

    Args:
        root: A folder, or anything else, which has none.

    Returns:
        The arrow or parquet files in order, by the split's name; nothing where there is no table.
    """
    root = Path(root)
    if not root.is_dir():
        return {}
    if (root / "dataset_dict.json").is_file():
        return {
            name: files
            for name in ("train", "validation", "val", "test")
            if (root / name / "state.json").is_file() and (files := sorted((root / name).glob("*.arrow")))
        }
    if (root / "state.json").is_file():
        return {"": sorted(root.glob("*.arrow"))}
    for folder in (root, root / "data"):
        splits: dict[str, list[Path]] = {}
        for suffix in _SUFFIXES:
            for path in sorted(folder.glob(f"*{suffix}")):
                found = _SPLIT_IN_NAME.search(path.name)
                splits.setdefault(found[1] if found else "", []).append(path)
            if splits:
                return splits
    return {}


def open_images(
    root: str | Path, what: str = "data.train_dir", max_pixels: int = MAX_PIXELS, split: Sequence[str] = TRAIN
) -> LightlyDataset:
    """Open a folder of images, or a table of them.

    Args:
        root: The folder.
        what: What to call the folder's option in an error.
        max_pixels: The most pixels that an image may have.
        split: Names of the split to take of a table, the first that is there.

    Returns:
        The dataset of (image, class index, name).

    Raises:
        DataError: If it cannot be read, or has no image or no such split.
    """
    splits = table_splits(root)
    if not splits:
        return image_folder(root, what, max_pixels)
    name = next((name for name in (*split, "") if name in splits), None)
    if name is None:
        raise DataError(f"{what}: {root} has no split {' or '.join(split)}, only {', '.join(splits)}.")
    return TableImages(Path(root), splits[name], what, max_pixels)


class TableImages(LightlyDataset):
    """A table of images for lightly's loop, of (image, class index, name).

    Args:
        root: Folder of the table.
        files: Its arrow or parquet files.
        what: What to call the folder's option in an error.
        max_pixels: The most pixels that an image may have.

    Raises:
        DataError: If the files cannot be read, or have no column of images.
    """

    def __init__(self, root: Path, files: list[Path], what: str, max_pixels: int = MAX_PIXELS) -> None:
        super().__init__(None, index_to_filename=_name_of)
        self.input_dir = str(root)
        self.files = files
        self.max_pixels = max_pixels
        self.dataset = Table(files, f"{what}: {root}")

    def signature(self, times: bool = True) -> str:
        """Return a SHA-256 of the files' names and sizes and, unless ``times`` is off, of when they were changed."""
        return files_signature(self.files[0].parent, [path.name for path in self.files], times)

    def check(self) -> Check:
        """Look at all images: which are unreadable, and a hash of all.

        The result is kept as that of :func:`~nepa_plugin.data.files.check_files`.
        """

        def look() -> Check:
            bad, sizes = {}, []
            for name, file, size in self.dataset.files():
                why, digest = ("not there", "") if file is None else examine(file, self.max_pixels)
                sizes.append((name, size, digest))
                if why:
                    bad[name] = why
            return Check(bad, hashlib.sha256(repr(sorted(sizes)).encode()).hexdigest())

        return kept_check(self.files[0].resolve(), f"{self.signature()} {self.max_pixels}", look)


def _name_of(dataset: "Table", index: int) -> str:
    return dataset.names[index]


class Table:
    """Rows of images and classes, as a torchvision dataset has them."""

    def __init__(self, files: list[Path], what: str) -> None:
        datasets = _import_datasets()
        try:
            if files[0].suffix == ".arrow":
                parts = [datasets.Dataset.from_file(str(path)) for path in files]
                table = datasets.concatenate_datasets(parts)
            else:
                cache = str(cache_dir() / "tables")
                table = datasets.Dataset.from_parquet([str(path) for path in files], cache_dir=cache)
        except Exception as error:  # pyarrow's, datasets' and the system's
            raise DataError(f"{what} cannot be read as a table of images: {' '.join(str(error).split())}") from error
        self.image, self.label = _columns(table.features, datasets, what)
        feature = table.features[self.label] if self.label else None
        table = table.select_columns([self.image, *([self.label] if self.label else [])])
        self.table = table.cast_column(self.image, datasets.Image(decode=False))
        if not len(self.table):
            raise DataError(f"{what} holds no image.")
        #: Class index of every row; none where a row has no label, as in a test split.
        self.targets: list[int] = list(self.table[self.label][:]) if self.label else []
        if any(target is None or target < 0 for target in self.targets):
            self.targets = []
        names = getattr(feature, "names", None)
        self.classes: list[str] = []
        if self.targets:
            self.classes = list(names or map(str, range(max(self.targets) + 1)))

    def __len__(self) -> int:
        return len(self.table)

    def _cells(self) -> Iterator[tuple[Any, list[str | None]]]:
        """Yield the images' bytes, as an arrow array in which those that are not there are null, and their paths."""
        for chunk in self.table.data.column(self.image).chunks:
            fields, parts = [field.name for field in chunk.type], chunk.flatten()  # null where the whole cell is
            data, paths = (parts[fields.index(name)] for name in ("bytes", "path"))
            yield data, paths.to_pylist()

    @cached_property
    def names(self) -> list[str]:
        """What all rows are called: by number, which no other has, and by the file's name, if that is known."""
        paths = [path for _, part in self._cells() for path in part]
        return [f"row {i} ({os.path.basename(path)})" if path else f"row {i}" for i, path in enumerate(paths)]

    def get_filenames(self) -> list[str]:
        """Return what all rows are called."""
        return self.names

    def files(self) -> Iterator[tuple[str, BinaryIO | None, int]]:
        """Yield name, file and size of every image in order; of one that is not there, none and 0.

        Of an image in the table nothing is read before the file is.
        """
        import pyarrow

        index = 0
        for data, paths in self._cells():
            for place, path in enumerate(paths):
                name, index = self.names[index], index + 1
                buffer = data[place].as_buffer()
                if buffer is not None:
                    yield name, pyarrow.BufferReader(buffer), buffer.size
                elif path is not None and os.path.isfile(path):
                    with open(path, "rb") as file:
                        yield name, file, os.path.getsize(path)
                else:
                    yield name, None, 0

    def read(self, index: int) -> tuple[Tensor, int]:
        """Return the bytes (N,) of an image's file, and its class.

        Raises:
            OSError: If there is none, or the table holds the path of a file that cannot be read.
        """
        cell = self.table[index][self.image] or {}
        if cell.get("bytes") is None and not cell.get("path"):
            raise FileNotFoundError("there is no image in this row")
        data = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
        return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy()), self.targets[index] if self.targets else 0

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        data, target = self.read(index)
        with Image.open(io.BytesIO(data.numpy().tobytes())) as image:
            return image.convert("RGB"), target


def _columns(features: Any, datasets: Any, what: str) -> tuple[str, str | None]:
    """Return the names of the column of images, and of that of classes, if there is one."""
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    # written without ``datasets``, a column of images is one of bytes and paths
    images += [
        name for name, feature in features.items() if isinstance(feature, dict) and {"bytes", "path"} <= set(feature)
    ]
    if not images:
        raise DataError(f"{what} has no column of images, only {', '.join(features)}.")
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    numbers = [n for n in ("label", "labels") if getattr(features.get(n), "dtype", "").startswith("int")]
    return images[0], next(iter([*labels, *numbers]), None)


def _import_datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DataError("Tables of images need the datasets package: pip install 'nepa-plugin[tables]'.") from error
    return datasets
