"""Image folders: opening them, finding unreadable files, and telling whether two folders hold the same images."""

import hashlib
import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from lightly.data import LightlyDataset
from PIL import Image
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from nepa_plugin.data.cache import cache_dir, private_folder
from nepa_plugin.data.errors import DataError
from nepa_plugin.data.extensions import IMAGE_EXTENSIONS
from nepa_plugin.runtime.files import write_json
from nepa_plugin.runtime.reading import read_json

#: What a file's name must end with, in capitals or not, to be taken for an image; lightly's and torchvision's own list.
#: A file of such a name makes lightly look for videos alone.
VIDEO_EXTENSIONS = (".mp4", ".mov", ".avi", ".mpg", ".hevc", ".m4v", ".webm", ".mpeg")
#: The most pixels that an image may have by default: Pillow's own bound, which a small file can exceed on purpose.
MAX_PIXELS = 178_956_970
#: What Pillow raises of a file that is no readable image, or has too many pixels.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
#: Bytes at the beginning and the end of each file that are looked at.
_ENDS = 4096

Item = TypeVar("Item")
Found = TypeVar("Found")

# pixel_limit is the bound, and Pillow warns from half of it on
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@contextmanager
def pixel_limit(max_pixels: int | None) -> Iterator[None]:
    """Let Pillow read images of so many pixels, or any, inside the block."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None if max_pixels is None else max_pixels // 2  # Pillow's error is at twice of it
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@dataclass(frozen=True)
class Check:
    """What was found in a list of image files.

    Attributes:
        bad: The unreadable ones, and what is wrong with each.
        content: A SHA-256 of all files' names, sizes, and bytes at both ends.
    """

    bad: dict[str, str]
    content: str

    def refusal(self, root: str | Path, remedy: str, kind: str = "images") -> DataError:
        """Return the error that names the unreadable files.

        Args:
            root: Their folder.
            remedy: What to do about them: a sentence.
            kind: What they should be.
        """
        names = ", ".join(f"{Path(root) / file} ({why})" for file, why in sorted(self.bad.items())[:5])
        more = " ..." if len(self.bad) > 5 else ""
        return DataError(f"{len(self.bad)} file(s) cannot be read as {kind}: {names}{more}. {remedy}")


class FolderImages(LightlyDataset):
    """An image folder as lightly reads it, of (image, class index, filename).

    Args:
        root: The folder.
        max_pixels: The most pixels that an image may have.
    """

    def __init__(self, root: str, max_pixels: int = MAX_PIXELS) -> None:
        super().__init__(root)
        self.max_pixels = max_pixels

    def signature(self, times: bool = True) -> str:
        """Return a SHA-256 of the files' names and sizes and, unless ``times`` is off, of when they were changed."""
        files = self.get_filenames()
        return files_signature(self.input_dir, files if times else sorted(files), times)

    def check(self) -> Check:
        """Look at all images: which are unreadable, and a hash of all; see :func:`check_files`."""
        return check_files(self.input_dir, self.get_filenames(), self.max_pixels)


def examine(file: BinaryIO, max_pixels: int) -> tuple[str, str]:
    """Return what is wrong with an image file, if anything, and a digest. Decodes it only if its end looks cut off."""
    head = file.read(_ENDS)
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _ENDS))
    tail = file.read()
    digest = hashlib.sha256(head + tail).hexdigest()
    end = tail[-16:]
    complete = (head[:2] == b"\xff\xd8" and b"\xff\xd9" in end) or (head[:4] == b"\x89PNG" and b"IEND" in end)
    file.seek(0)
    try:
        with Image.open(file) as image:  # parses the header
            if (pixels := image.width * image.height) > max_pixels:
                return f"{pixels:,} pixels, more than max_image_pixels {max_pixels:,}", digest
            if not complete:
                image.load()
    except IMAGE_ERRORS:
        return "damaged", digest
    return "", digest


def _examine_file(path: str, max_pixels: int) -> tuple[str, str]:
    """Do the same with the file at a path."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "no regular file", ""  # a pipe would be waited for without end
        with open(path, "rb") as file:
            return examine(file, max_pixels)
    except FileNotFoundError:
        return "a link to nothing" if os.path.islink(path) else "not there any more", ""
    except PermissionError:
        return "no permission", ""
    except OSError:
        return "damaged", ""


def check_files(root: str | Path, files: list[str], max_pixels: int = MAX_PIXELS) -> Check:
    """Look at image files: which are unreadable, and a hash of all.

    The result is kept in :func:`cache_dir` and reused as long as names, sizes and times of the files are the same.

    Args:
        root: The image folder.
        files: Paths relative to it.
        max_pixels: The most pixels that an image may have.

    Returns:
        What was found.
    """
    root = Path(root).resolve()

    def look() -> Check:
        found = in_threads(lambda file: _examine_file(os.path.join(root, file), max_pixels), files)
        bad = {file: why for file, (why, _) in zip(files, found, strict=True) if why}
        stats = zip(files, _stats(root, files), found, strict=True)
        sizes = sorted((file, info[1], digest) for file, info, (_, digest) in stats)
        return Check(bad, hashlib.sha256(repr(sizes).encode()).hexdigest())

    return kept_check(root, f"{files_signature(root, files)} {max_pixels}", look)


def kept_check(root: Path, signature: str, look: Callable[[], Check]) -> Check:
    """Return what is kept of an earlier look at images, or look, and keep it.

    Args:
        root: Where the images are; the record's key.
        signature: What must not have changed since.
        look: Looks at all of them.
    """
    record = _check_record(root)
    with suppress(OSError, ValueError):  # there is none, or a damaged one
        known = read_json(record, {"signature": str, "bad": dict, "content": str}, "")
        if known["signature"] == signature:
            return Check(known["bad"], known["content"])
    # The bound is looked at here, not by Pillow. Threads share the filters of warnings, which are set once for all.
    with pixel_limit(None), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check = look()
    with suppress(OSError):  # nothing is lost but time
        private_folder(record.parent)
        write_json(record, {"root": str(root), "signature": signature, "bad": check.bad, "content": check.content})
    return check


def find_bad_images(root: str | Path, files: list[str], max_pixels: int = MAX_PIXELS) -> list[str]:
    """Return those of ``files`` (relative to ``root``) that cannot be read as images; see :func:`check_files`."""
    bad = check_files(root, files, max_pixels).bad
    return [file for file in files if file in bad]


def _stats(root: Path, files: list[str]) -> list[tuple[str, int, int]]:
    """Return name, size and time of change of files; of one that is not there, -1 and 0."""

    def one(file: str) -> tuple[str, int, int]:
        try:
            info = os.stat(os.path.join(root, file))  # a Path for each would take longer than the call
        except OSError:
            return file, -1, 0
        return file, info.st_size, info.st_mtime_ns

    return in_threads(one, files)


def files_signature(root: str | Path, files: list[str], times: bool = True) -> str:
    """Return a SHA-256 of files' names and sizes and, unless ``times`` is off, of when they were changed."""
    stats = _stats(Path(root), files)
    return hashlib.sha256(repr(stats if times else [info[:2] for info in stats]).encode()).hexdigest()


def in_threads(function: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
    """Return what a function that waits for files returns for each item, in order; several at a time.

    Args:
        function: What is called in threads; its first error is raised.
        items: Its arguments.

    Returns:
        The results.
    """
    threads = min(32, 4 * (os.cpu_count() or 1))
    # A task's own cost is many times that of a call on a local disk, and there may be millions of files.
    length = max(1, min(64, len(items) // (8 * threads)))
    parts = [items[start : start + length] for start in range(0, len(items), length)]
    with ThreadPoolExecutor(threads) as pool:
        return list(chain.from_iterable(pool.map(lambda part: [function(item) for item in part], parts)))


def fingerprint(images: Any) -> str:
    """Return a hash of the names and sizes of a dataset's files: equal for copies, different for other images."""
    return str(images.signature(times=False))[:16]


def content_fingerprint(images: Any) -> str:
    """Return a hash of the names, sizes and contents of a dataset's files: equal for copies, whatever their times.

    Of the contents it takes 4 KB at the beginning and 4 KB at the end of each file, which are read anyway to find
    unreadable files.
    """
    return str(images.check().content)


def _check_record(root: Path) -> Path:
    return cache_dir() / "checked" / (hashlib.sha256(str(root).encode()).hexdigest()[:24] + ".json")


def image_folder(root: str | Path, what: str = "data.train_dir", max_pixels: int = MAX_PIXELS) -> FolderImages:
    """Open an image folder as lightly reads it: with a sub-folder per class, or flat. Says what is left out.

    Args:
        root: The folder.
        what: What to call the folder's option in an error.
        max_pixels: The most pixels that an image may have.

    Returns:
        The dataset of (image, class index, filename).

    Raises:
        DataError: If the folder is missing or holds no image, a folder in it cannot be read, or a link leads back.
    """
    path = Path(root)
    if not os.path.isdir(path):
        found = "is a file, no folder" if os.path.lexists(path) else ""
        problem = f"{path} {found}" if found else f"no folder at {path}"
        raise DataError(f"{what}: {problem}. Give a folder of images, with one sub-folder per class or flat.")
    images, others = _scan(path, what)
    if videos := sum(others[extension] for extension in VIDEO_EXTENSIONS):
        raise DataError(
            f"{what}: {path} holds {videos} video(s), which lightly reads instead of images. Move them away."
        )
    if not images:
        raise DataError(f"{what}: {path} holds no image. Known extensions: {', '.join(IMAGE_EXTENSIONS)}.")
    try:
        dataset = FolderImages(str(path), max_pixels)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{what}: {path} cannot be read as an image folder: {reason}") from error
    elsewhere = images - len(dataset)
    if elsewhere or others:
        parts = [f"{elsewhere} image(s) that are in no sub-folder"] if elsewhere else []
        parts += [f"{count} {name}" for name, count in sorted(others.items(), key=lambda item: (-item[1], item[0]))[:5]]
        parts += ["others"] if len(others) > 5 else []
        rank_zero_info(
            f"{what}: {len(dataset)} images in {path}; left out {elsewhere + others.total()} other file(s): "
            f"{', '.join(parts)}."
        )
    return dataset


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return name.lower().endswith(IMAGE_EXTENSIONS)


def _scan(root: Path, what: str) -> tuple[int, Counter[str]]:
    """Return the number of image files below a folder, and of others by extension."""
    images, others = 0, Counter[str]()
    folders: list[tuple[str, tuple[str, ...]]] = [(str(root), (os.path.realpath(root),))]
    while folders:
        folder, above = folders.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise DataError(f"{what}: the folder {folder} cannot be read: {error.strerror}.") from error
        for entry in entries:
            if _is_folder(entry):
                real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
                if real in above:  # torchvision would follow it until the path is too long
                    raise DataError(f"{what}: {entry.path} is a link to a folder that it is in. Remove the link.")
                folders.append((entry.path, (*above, real)))
            elif is_image_name(entry.name):
                images += 1
            else:
                others[os.path.splitext(entry.name)[1].lower() or "without extension"] += 1
    return images, others


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def class_names(images: LightlyDataset | None) -> list[str]:
    """Return the names of the classes in order of their index; none for a flat folder, or no images."""
    return list(getattr(images.dataset, "classes", [])) if images is not None else []
