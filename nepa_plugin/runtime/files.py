"""Files that are there whole or not at all, whatever happens while they are written, and what a kill leaves over."""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Whatever is being written has a name that begins so, beside the place it is for.
PART_PREFIX = ".saving-"
#: Seconds after which a part that another host began is taken for one that a kill left over.
ABANDONED = 24 * 3600


@contextlib.contextmanager
def whole_file(path: str | Path, previous: str | Path | None = None) -> Iterator[Path]:
    """Give a path to write to, which takes the place of ``path`` when the block ends well.

    What was written is forced to the disk before the rename. The part lies beside its place: from another file system
    the last step would be a copy, which a kill or a full disk leaves half done.

    Args:
        path: The file; its folder is made if need be.
        previous: Where the file that ``path`` was until now goes; it is dropped by default.

    Yields:
        The path to write to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    try:
        yield part
        _sync(part)
        if previous is not None and path.is_file():
            link = part_of(Path(previous))
            link.unlink(missing_ok=True)
            os.link(path, link)  # the old file has both names until the new one takes the first
            os.replace(link, previous)
        os.replace(part, path)
        _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Give a folder to fill, which is renamed to ``path`` when the block ends well; see :func:`whole_file`.

    Parts of the same folder that a kill left over are removed first.

    Args:
        path: The folder; it must not exist when the block ends.

    Yields:
        The folder to fill.

    Raises:
        OSError: If something has the place by then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_parts(path.parent, path.name)
    part = Path(tempfile.mkdtemp(dir=path.parent, prefix=part_of(path).name + "-"))
    try:
        yield part
        part.chmod(0o777 & ~_umask())  # mkdtemp's is for its owner alone
        part.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file at once or not at all."""
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a small file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def part_of(path: Path) -> Path:
    """Return where this process writes what is for ``path``."""
    return path.with_name(f"{PART_PREFIX}{path.name}.{socket.gethostname()}.{os.getpid()}")


def remove_parts(folder: str | Path, name: str = "", everything: bool = False) -> list[Path]:
    """Remove what writers that are gone have left over.

    Args:
        folder: Where; not below it.
        name: Only of this file or folder.
        everything: Take no writer to be alive, as where the folder is locked.

    Returns:
        What was removed.
    """
    removed = []
    for part in sorted(Path(folder).glob(f"{PART_PREFIX}{name}*")):
        if everything or _abandoned(part):
            if part.is_dir() and not part.is_symlink():
                shutil.rmtree(part, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    part.unlink()
            removed.append(part)
    return removed


def _abandoned(part: Path) -> bool:
    before, _, after = part.name.rpartition(f".{socket.gethostname()}.")
    number = after.partition("-")[0]  # a folder's name goes on
    if before and number.isdigit():
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return int(number) == os.getpid()  # this process writes one thing at a time
    try:
        return time.time() - part.lstat().st_mtime > ABANDONED
    except OSError:
        return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # not every file system can do this for a folder
            raise
    finally:
        os.close(handle)
