"""The boundary of the commands that load, score and compare: what a user can mend is one line on stderr, status 2."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator

import torch

from nepa_plugin.runtime.boundary import boundary, in_words


def explain(error: BaseException) -> str:
    """Return what an error says, in one line.

    A loader process sends its traceback along, of which the last line is the error.
    """
    text = str(error)
    if "Original Traceback" in text:
        last = [line for line in text.splitlines() if line.strip()][-1]
        return re.sub(r"^[\w.]+(Error|Exception): ", "", last)
    if isinstance(error, torch.OutOfMemoryError):
        return f"The GPU's memory is too small: lower the batch size. {in_words(error)}"
    return in_words(error)


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn what a user can mend into ``error: ...`` and an exit; a bug keeps its traceback.

    Raises:
        SystemExit: With status 2, 130 if interrupted from the keyboard, or 141 if nobody reads the output any more.
    """
    try:
        with boundary(torch.OutOfMemoryError, explain=explain):
            try:
                yield
                sys.stdout.flush()
            except BrokenPipeError:
                # Python flushes stdout once more when it ends, which would fail again
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(141)
    except MemoryError:
        sys.stderr.write("error: The memory of this machine is too small for that.\n")
        sys.exit(2)
