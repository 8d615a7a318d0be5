"""Features on disk, keyed by the weights, the model's configuration, the images and how they were prepared."""

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nepa_plugin.checkpoints import CheckpointError, backbone_config
from nepa_plugin.data.cache import cache_dir, private_folder
from nepa_plugin.runtime.files import remove_parts, whole_file

FORMAT = 1  # raise it when features of the same key would differ


def model_description(model: nn.Module) -> str:
    """Return what, next to the weights, decides a model's features."""
    try:
        config = json.dumps(backbone_config(model), sort_keys=True, default=str)
    except CheckpointError:  # not built by name
        config = repr(model)
    return f"{type(model).__name__} {getattr(model, 'attention', '')} {config}"


def files_hash(images: Any) -> str:
    """Return a SHA-256 of a folder's files: path, size and time of each."""
    root = Path(images.input_dir).resolve()
    return hashlib.sha256(f"{root} {images.signature()}".encode()).hexdigest()


class FeatureCache:
    """The features of one model on one set of images: a folder with a safetensors file per depth and pooling.

    Args:
        key: Whatever the features depend on.
        labels: The images' classes (N,), in their order.
        width: Channels of a token.
        root: The folder of all features; ``features`` in the package's cache by default.
    """

    def __init__(self, key: Iterable[str], labels: Tensor, width: int, root: Path | None = None) -> None:
        self.labels = labels
        self.width = width
        digest = hashlib.sha256("\n".join([str(FORMAT), *key]).encode()).hexdigest()[:32]
        self.folder = (root or cache_dir() / "features") / digest

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return those of the named tensors that are there, undamaged, and of these images and this width.

        The files are mapped into memory: what is read of them takes memory that the system can take back.
        """
        found = {}
        for name in names:
            with suppress(OSError, SafetensorError, KeyError):
                value = load_file(self._path(name))["values"]
                if self._fits(name, value):
                    found[name] = value
        return found

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, each at once or not at all; warns where that is not possible, as nothing is lost but time."""
        try:
            private_folder(self.folder)
            remove_parts(self.folder)
            for name, value in tensors.items():
                with whole_file(self._path(name)) as part:
                    save_file({"values": value.contiguous()}, part)
        except (OSError, SafetensorError) as error:
            warnings.warn(f"The features are not kept in {self.folder}: {error}", stacklevel=2)

    def _fits(self, name: str, value: Tensor) -> bool:
        if name == "labels":
            return value.dtype == self.labels.dtype and torch.equal(value, self.labels)
        shape, tokens = value.shape, name.endswith("/tokens")
        right = len(shape) == (3 if tokens else 2) and shape[0] == len(self.labels) and shape[-1] == self.width
        # in parts: the values are mapped into memory, a mask of all of them would not be
        return right and value.dtype == torch.float32 and all(bool(part.isfinite().all()) for part in value.split(4096))

    def _path(self, name: str) -> Path:
        return self.folder / (name.replace("/", "-").replace(" ", "_") + ".safetensors")
