"""Images in: folders, shards and the embedded digits, their augmentation and order, and the loaders of evaluation.

The names below are imported when they are asked for, so that the segmentation side, which needs the digits alone, needs
no Lightning.
"""

import importlib
from typing import Any

_WHERE = {
    "cache": ("cache_dir",),
    "errors": ("DataError",),
    "digits": ("TRAINING_DIGITS", "digit_images", "digits_folder"),
    "evaluation": (
        "ImageFormat",
        "evaluation_crop",
        "evaluation_folders",
        "evaluation_images",
        "evaluation_loaders",
        "image_size",
    ),
    "files": (
        "IMAGE_EXTENSIONS",
        "MAX_PIXELS",
        "check_files",
        "class_names",
        "content_fingerprint",
        "files_signature",
        "find_bad_images",
        "fingerprint",
        "image_folder",
    ),
    "module": ("ImageData",),
    "samples": ("EpochBatchSampler", "ResumableLoader", "SeededDataset", "loader_workers"),
    "transforms": ("NEPATransform", "eval_transform"),
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
