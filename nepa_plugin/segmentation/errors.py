"""One line instead of a traceback where a user's config, data or checkpoint is wrong."""

import sys
from pathlib import Path
from types import TracebackType

import mmengine.registry

from nepa_plugin.checkpoints import CheckpointError

_PACKAGE = Path(__file__).parent.parent
_REGISTRY = Path(mmengine.registry.__file__).parent


class ConfigError(ValueError):
    """A config asks for what cannot be; the message names the key and says what to do."""


class DatasetError(ValueError):
    """The dataset cannot be used as configured; the message names the folder, file or key and says what to do."""


class DivergenceError(RuntimeError):
    """Training has left the finite numbers; the message says when, and what to try."""


def is_bad_input(error: BaseException, traceback: TracebackType | None) -> bool:
    """Tell an error that was raised on purpose, about the input, from a failure.

    Args:
        error: The exception.
        traceback: Where it comes from.

    Returns:
        Whether it is one of this package's errors, a file that this package did not find or would not overwrite, or
        an unknown ``type`` or argument in a config.
    """
    if isinstance(error, (CheckpointError, ConfigError, DatasetError, DivergenceError)):
        return True
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    file = Path(traceback.tb_frame.f_code.co_filename)
    if _PACKAGE in file.parents:
        return isinstance(error, (FileNotFoundError, FileExistsError))
    return _REGISTRY in file.parents and isinstance(error, (TypeError, KeyError))


def print_bad_input_in_one_line() -> None:
    """Let scripts that import this package end with ``error: ...`` on bad input; all else keeps its traceback.

    mmengine's training and test scripts are not ours, so that nothing can be caught around them.
    """
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if is_bad_input(error, traceback):
            text = error.args[0] if isinstance(error, KeyError) else str(error)
            sys.stderr.write(f"error: {' '.join(str(text).split())}\n")
        else:
            previous(kind, error, traceback)

    sys.excepthook = hook
