"""One line instead of a traceback where a user's config, data or checkpoint is wrong, in scripts that are not ours."""

import os
import re
import sys
import traceback as tracebacks
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import mmengine
from mmengine.config import Config

from nepa_plugin.checkpoints import CheckpointError
from nepa_plugin.runtime.boundary import in_words
from nepa_plugin.segmentation.errors import ConfigError, DatasetError, DivergenceError
from nepa_plugin.segmentation.options import check_config

_PACKAGE = Path(__file__).parent.parent
_MMENGINE = Path(mmengine.__file__).parent
#: Where mmengine reads configs, and builds what they say.
_BUILDING = [_MMENGINE / "registry", _MMENGINE / "config", _MMENGINE / "runner" / "runner.py"]
#: With this in the environment every error keeps its traceback.
TRACEBACK = "NEPA_TRACEBACK"
#: What others say while a run is under way -> what to do about it.
_ADVICE = {
    r"Expected more than 1 value per channel when training": "BatchNorm needs more than one image per device: raise "
    "train_dataloader.batch_size, or train on several devices, where SyncBN sees the images of all.",
    r"to have \d+ channels, but got \d+ channels instead": "model.neck.embed_dim and the in_channels of the heads must "
    "be the backbone's width, one for each of its out_indices.",
    r"No space left on device|Disk quota exceeded": "Make room, and go on with --resume.",
}


def in_one_line(error: BaseException, traceback: TracebackType | None) -> str | None:
    """Say what is wrong with a run's input, if that is what an error is about.

    That is: the errors of this package; files that are not there, or cannot be written; and what fails while mmengine
    reads the config and builds what it says, before the first step. For the latter the config is held against
    :func:`~.options.check_config`, which may know better.

    Args:
        error: The exception.
        traceback: Where it comes from.

    Returns:
        One line, or ``None`` for a failure, which should keep its traceback.
    """
    text = _text(error)
    if isinstance(error, (CheckpointError, ConfigError, DatasetError, DivergenceError)):
        return text
    frames = [frame for frame, _ in tracebacks.walk_tb(traceback)]
    if not frames or not isinstance(error, Exception):
        return None
    files = [Path(frame.f_code.co_filename) for frame in frames]
    if isinstance(error, OSError) and (_PACKAGE in files[-1].parents or error.filename):
        return in_words(error)
    for said, advice in _ADVICE.items():
        if re.search(said, text):
            return f"{text}. {advice}"
    if not any(place == file or place in file.parents for file in files for place in _BUILDING):
        return None
    if any(frame.f_code.co_name == "run" and file.parent == _MMENGINE / "runner" for frame, file in _both(frames)):
        return None  # a loop was running
    for cfg in _configs(frames):
        try:
            check_config(cfg)
        except ConfigError as known:
            return str(known)
    built = [frame.f_locals.get("cfg") for frame in frames if frame.f_code.co_name == "build_from_cfg"]
    names = [str(cfg["type"]) for cfg in built if isinstance(cfg, dict) and "type" in cfg]
    place = "" if not names or names[-1] in text else f"{names[-1]}: "
    sentence = isinstance(error, (AssertionError, KeyError)) and " " in text
    if sentence or isinstance(error, (ValueError, OSError)) or (isinstance(error, TypeError) and "argument" in text):
        return f"{place}{text}"
    where = f"{files[-1].name}:{tracebacks.extract_tb(traceback)[-1].lineno}"
    return f"{place}{type(error).__name__}: {text} (at {where}; {TRACEBACK}=1 shows the traceback)"


def _text(error: BaseException) -> str:
    """Return an error's text in one line; of what a loader process sends along, the last line."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if "Original Traceback" in text:
        text = re.sub(r"^[\w.]+(Error|Exception): ", "", [line for line in text.splitlines() if line.strip()][-1])
    return " ".join(text.split())


def _both(frames: list[FrameType]) -> Iterator[tuple[FrameType, Path]]:
    return ((frame, Path(frame.f_code.co_filename)) for frame in frames)


def _configs(frames: list[FrameType]) -> Iterator[Config]:
    """Yield the whole config that was being built, if there is one."""
    for frame in frames:
        runner: Any = frame.f_locals.get("self")
        for cfg in (frame.f_locals.get("cfg"), getattr(runner, "cfg", None)):
            if isinstance(cfg, Config) and "model" in cfg:
                yield cfg


def print_bad_input_in_one_line() -> None:
    """Let scripts that import this package end with ``error: ...`` on bad input; all else keeps its traceback.

    mmengine's training and test scripts are not ours, so that nothing can be caught around them.
    """
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        line = None if os.environ.get(TRACEBACK) else in_one_line(error, traceback)
        if line is None:
            previous(kind, error, traceback)
        else:
            sys.stderr.write(f"error: {line}\n")

    sys.excepthook = hook
