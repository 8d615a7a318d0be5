"""One writer at a time in a folder."""

import errno
import fcntl
import os
import socket
import warnings
from pathlib import Path
from typing import IO

LOCK = ".lock"
#: What a file system says that has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FolderInUseError(ValueError):
    """Another process writes to a folder, or this one may not; the message says who and what to do."""


def lock_folder(path: str | Path, option: str) -> IO[str] | None:
    """Keep others out of a folder for as long as the lock is open, at most as long as this process lives.

    The lock is the kernel's: however the process ends, the lock ends with it.

    Args:
        path: The folder; made if need be.
        option: What chooses the folder, for the message.

    Returns:
        The lock, to be closed; ``None``, with a warning, where the file system has none.

    Raises:
        FolderInUseError: If another process holds the lock, or the folder cannot be written to.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = (path / LOCK).open("a+")
    except OSError as error:
        raise FolderInUseError(
            f"{option}: {path} cannot be written to: {error.strerror}. Choose another folder."
        ) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            file.close()
            warnings.warn(f"{path} is on a file system without locks: let no other run write to it.", stacklevel=2)
            return None
        file.seek(0)
        holder = " ".join(file.read().split()) or "another process"
        file.close()
        raise FolderInUseError(
            f"{path} is in use by {holder}. Wait for it, stop it, or choose another {option}."
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
