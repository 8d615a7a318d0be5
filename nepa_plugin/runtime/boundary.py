"""The boundary of every command: what a user can mend is one line on stderr, and a status that is not 0."""

import contextlib
import errno
import sys
from collections.abc import Callable, Iterator

_ADVICE = {
    errno.ENOSPC: "make room, or write elsewhere",
    errno.EDQUOT: "make room, or write elsewhere",
    errno.EACCES: "you lack the permission",
    errno.EPERM: "you lack the permission",
    errno.EROFS: "it can only be read; write elsewhere",
    errno.ENAMETOOLONG: "choose a shorter one",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or use fewer loader processes",
}


def in_words(error: BaseException) -> str:
    """Return what an error says, in one line.

    Args:
        error: Of the file system, with the file's name and what to do, or any other.
    """
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        name = f"{error.filename}: " if error.filename is not None else ""
        advice = f" ({_ADVICE[error.errno]})" if error.errno in _ADVICE else ""
        return f"{name}{error.strerror}{advice}."
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def boundary(
    *also: type[BaseException], status: int = 2, explain: Callable[[BaseException], str] = in_words
) -> Iterator[None]:
    """Turn what a user can mend into ``error: ...`` and an exit; whatever else is a bug, and keeps its traceback.

    What a user can mend is a ``ValueError``, as all errors of this package are, and what the file system says.

    Args:
        also: Further kinds of error.
        status: The exit's status. A run that is interrupted from the keyboard has 130.
        explain: What to say of an error.

    Raises:
        SystemExit: Instead of the error.
    """
    mended: tuple[type[BaseException], ...] = (ValueError, OSError, *also)
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted.\n")
        sys.exit(130)
    except mended as error:
        sys.stderr.write(f"error: {explain(error)}\n")
        sys.exit(status)
