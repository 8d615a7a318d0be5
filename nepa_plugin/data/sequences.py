"""Folders of sequences: one file of vectors (T, D) each, for models that take vectors in place of patches."""

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightly.data import LightlyDataset
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nepa_plugin.data.errors import DataError
from nepa_plugin.data.files import Check, files_signature, is_image_name, kept_check
from nepa_plugin.data.pipelines import PilPipeline, ViewKey
from nepa_plugin.data.samples import torch_seeded

SEQUENCE_EXTENSIONS = (".npy", ".safetensors")


def is_sequence_folder(root: str | Path) -> bool:
    """Whether there are files of sequences in a folder and those in it, and no image: the first one ends the search."""
    found = False
    for _, _, names in os.walk(root):
        if any(map(is_image_name, names)):
            return False
        found = found or any(name.endswith(SEQUENCE_EXTENSIONS) for name in names)
    return found


class SequenceFolder(LightlyDataset):
    """A folder of sequences for lightly's loop, of (vectors (T, D), class index, name).

    Each ``.npy`` file holds an array (T, D), each ``.safetensors`` file one tensor (T, D); T may differ, D may not.
    With a sub-folder per class there are labels, as for images.

    Args:
        root: The folder.
        what: What to call the folder's option in an error.

    Raises:
        DataError: If it holds none.
    """

    def __init__(self, root: str | Path, what: str = "data.train_dir") -> None:
        super().__init__(None, index_to_filename=_name_of)
        self.input_dir = str(root)
        self.dataset = Sequences(Path(root), what)

    @property
    def width(self) -> int:
        """Numbers in a vector, D."""
        return self.dataset.width

    def signature(self, times: bool = True) -> str:
        """Return a SHA-256 of the files' names and sizes and, unless ``times`` is off, of when they were changed."""
        return files_signature(self.input_dir, self.dataset.names, times)

    def check(self) -> Check:
        """Look at the shapes of all sequences: which cannot be used, and a hash of all."""

        def look() -> Check:
            bad, found = {}, []
            for name in self.dataset.names:
                path = Path(self.input_dir) / name
                try:
                    shape = _shape(path)
                except (OSError, ValueError, SafetensorError) as error:
                    bad[name] = " ".join(str(error).split()) or "damaged"
                    continue
                found.append((name, shape))
                if shape[1] != self.width:
                    bad[name] = f"{shape[1]} numbers in a vector, others have {self.width}"
                elif shape[0] < 1:
                    bad[name] = "no vector"
            return Check(bad, hashlib.sha256(repr(found).encode()).hexdigest())

        return kept_check(Path(self.input_dir).resolve() / "sequences", self.signature(), look)


def _name_of(dataset: "Sequences", index: int) -> str:
    return dataset.names[index]


def check_width(sequences: SequenceFolder | None, input_dim: int | None) -> None:
    """Check that the training data are what a backbone takes.

    Args:
        sequences: The training data where they are sequences.
        input_dim: Numbers in a vector that the backbone takes; nothing where it takes images.

    Raises:
        DataError: If they are not.
    """
    if sequences is None:
        if input_dim is not None:
            raise DataError(
                "data.train_dir holds images, but the backbone takes sequences: give a folder of .npy or .safetensors "
                "files, or a nepa_vit_* backbone."
            )
        return
    remedy = f"--model.backbone_args.input_dim {sequences.width}"
    if input_dim is None:
        raise DataError(
            f"{sequences.input_dir} holds sequences, but the backbone takes images: take nepa_sequence_tiny, _small or "
            f"_base as --model.backbone, with {remedy}."
        )
    if input_dim != sequences.width:
        raise DataError(
            f"{sequences.input_dir} has {sequences.width} numbers in a vector, but the backbone takes {input_dim}: "
            f"{remedy}."
        )


class Sequences:
    """Files of vectors and their classes, as a torchvision dataset has them."""

    def __init__(self, root: Path, what: str) -> None:
        self.root = root
        paths = sorted(
            Path(folder) / name
            for folder, _, names in os.walk(root)
            for name in names
            if name.endswith(SEQUENCE_EXTENSIONS)
        )
        if not paths:
            raise DataError(f"{what}: {root} holds no {' or '.join(SEQUENCE_EXTENSIONS)} file.")
        self.names = [str(path.relative_to(root)) for path in paths]
        folders = [Path(name).parts[0] if len(Path(name).parts) > 1 else "" for name in self.names]
        #: Names of the classes; none where files lie in the folder itself.
        self.classes: list[str] = sorted(set(folders)) if "" not in folders else []
        places = {name: place for place, name in enumerate(self.classes)}
        self.targets = [places.get(folder, 0) for folder in folders]
        self.what = what

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def width(self) -> int:
        """Numbers in a vector, by the first file that can be read."""
        reason = ""
        for name in self.names:
            try:
                return _shape(self.root / name)[1]
            except (OSError, ValueError, SafetensorError) as error:
                reason = reason or f"{name}: {error}"
        raise DataError(f"{self.what}: no sequence in {self.root} can be read ({reason}).")

    def get_filenames(self) -> list[str]:
        """Return all files, relative to the folder."""
        return self.names

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.root / self.names[index]
        if path.suffix == ".npy":
            vectors = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            with _opened(path) as file:
                vectors = file.get_tensor(_only(file))
        return vectors.float(), self.targets[index]


def _shape(path: Path) -> tuple[int, int]:
    """Return (T, D) of a file, of which only the head is read; ``ValueError`` if it holds something else."""
    if path.suffix == ".npy":
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        shape, plain = array.shape, np.issubdtype(array.dtype, np.number)
    else:
        with _opened(path) as file:
            shape, plain = tuple(file.get_slice(_only(file)).get_shape()), True
    if len(shape) != 2 or not plain or not shape[1]:
        raise ValueError(f"holds no vectors (T, D), but an array {tuple(shape)}")
    return int(shape[0]), int(shape[1])


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"damaged: {error}") from error


def _only(file: Any) -> str:
    """Return the name of the one tensor in a safetensors file."""
    names = list(file.keys())
    if len(names) != 1:
        raise ValueError(f"holds {len(names)} tensors ({', '.join(names[:3])}), where one is looked for")
    return str(names[0])


class SequencePipeline(PilPipeline):
    """From sequences to a batch: cut to a length at a random place, padded to the longest, with the lengths.

    Args:
        max_tokens: The most vectors of a sequence; without, all.
    """

    opens_with_pillow = False

    def __init__(self, max_tokens: int | None) -> None:
        self.max_tokens = max_tokens
        self.collate = self._padded

    def view(self, image: Tensor, key: ViewKey) -> Tensor:
        """Return so many vectors in a row of a sequence (T, D); where they begin depends on ``key`` alone."""
        extra = len(image) - (self.max_tokens or len(image))
        if extra <= 0:
            return image
        with torch_seeded(*key):
            start = int(torch.randint(extra + 1, ()))
        return image[start : start + len(image) - extra]

    def _padded(self, samples: Sequence[tuple[Tensor, int, str]]) -> Any:
        """Return (views, labels, names, lengths): one view (B, T, D) with zeros after the end, and one tensor (B,)."""
        sequences, labels, names = zip(*samples, strict=True)
        padded = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
        return [padded], torch.tensor(labels), list(names), [torch.tensor([len(one) for one in sequences])]
