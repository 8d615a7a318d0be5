"""Where results will be written, tried before the work and not after it."""

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from nepa_plugin.runtime.boundary import in_words


class PlaceError(ValueError):
    """Something cannot be written where it was asked for; the message says why."""


def check_folder(path: str | Path, what: str = "--out") -> None:
    """Check that files can be written into a folder, which need not exist; leaves nothing behind.

    Args:
        path: The folder.
        what: What to call it in an error.

    Raises:
        PlaceError: If something else is there, it is on a disk that is full or can only be read, or is forbidden.
    """
    _check(Path(path), what, stat.S_ISDIR, "it is no folder")


def check_file(path: str | Path, what: str = "--out") -> None:
    """Check that a file can be written, or replaced; arguments and errors as for :func:`check_folder`."""
    if str(path).endswith(os.sep):
        raise PlaceError(f"{what} {path}: give the name of a file.")
    _check(Path(path), what, stat.S_ISREG, "it is no file")


def _check(path: Path, what: str, right: Callable[[int], bool], wrong: str) -> None:
    try:
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            if path.is_symlink():
                raise PlaceError(f"{what} {path}: it is a link to nothing.") from None
        else:
            if not right(mode):
                raise PlaceError(f"{what} {path}: {wrong}.")
        folder = path if path.is_dir() else path.absolute().parent
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = None
        raise PlaceError(f"{what} {path}: {in_words(error)}") from error
    except ValueError as error:
        if isinstance(error, PlaceError):
            raise
        raise PlaceError(f"{what} {str(path)!r}: {error}.") from error
