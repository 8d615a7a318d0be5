"""Packed shards: training images read one after the other from tar files, with webdataset."""

import hashlib
import io
import json
import os
import re
import tarfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from nepa_plugin.data.errors import DataError
from nepa_plugin.data.files import IMAGE_ERRORS, IMAGE_EXTENSIONS, MAX_PIXELS, pixel_limit
from nepa_plugin.data.pipelines import PilPipeline
from nepa_plugin.data.samples import ResumableLoader
from nepa_plugin.data.sources import beside, import_webdataset, is_local, shard_name, shard_urls
from nepa_plugin.runtime.reading import JSON_BYTES, read_text

INDEX = "index.json"
#: Largest file in a shard, in bytes.
MAX_FILE_BYTES = 2**30
READ_ERRORS = (OSError, EOFError, ValueError, tarfile.TarError)


@dataclass(frozen=True)
class Shards:
    """Shards and what their index says about them.

    Attributes:
        source: What the user gave.
        urls: The shards, as webdataset opens them.
        counts: Images in each.
        classes: Names of the classes; none if there are no labels.
    """

    source: str
    urls: list[str]
    counts: list[int]
    classes: list[str]

    @property
    def fingerprint(self) -> str:
        """A hash of the shards' names and numbers of images."""
        names = [(shard_name(url), count) for url, count in zip(self.urls, self.counts, strict=True)]
        return hashlib.sha256(repr(names).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return sum(self.counts)


def open_shards(source: str, allow_pipe: bool = False) -> Shards:
    """Open shards by the ``index.json`` beside them, which ``tools/make_shards.py`` writes.

    Args:
        source: As :func:`shard_urls` takes it.
        allow_pipe: Whether ``pipe:`` commands may be run.

    Returns:
        The shards.

    Raises:
        DataError: If a shard is missing or has no image, or the index is missing, damaged, or another one's.
    """
    urls = shard_urls(source, allow_pipe)
    location = beside(urls[0], INDEX)
    try:
        counts, classes = _index(_read_index(location))
    except (*READ_ERRORS, RecursionError) as error:
        reason = str(error).removeprefix(f"{location} ").rstrip(".")
        raise DataError(
            f"data.train_shards: {location} is no index of shards ({reason}). tools/make_shards.py writes it with the "
            "shards; for other shards, make_shards.py --index counts them."
        ) from error
    if unknown := [url for url in urls if shard_name(url) not in counts]:
        raise DataError(f"data.train_shards: {location} does not list {unknown[0]}. Make the index anew.")
    if empty := [url for url in urls if counts[shard_name(url)] < 1]:
        raise DataError(f"data.train_shards: there is no image in {empty[0]}.")
    return Shards(source, urls, [counts[shard_name(url)] for url in urls], classes)


def _read_index(location: str) -> Any:
    if is_local(location):
        return json.loads(read_text(location, JSON_BYTES))
    with import_webdataset().gopen(location) as file:
        data = file.read(JSON_BYTES + 1)
    if len(data) > JSON_BYTES:
        raise ValueError(f"more than {JSON_BYTES:,} bytes")
    return json.loads(data)


def _index(index: Any) -> tuple[dict[str, int], list[str]]:
    """Return the number of images by shard, and the classes, of an index; ``ValueError`` says what is wrong with it."""
    if not isinstance(index, dict) or not isinstance(index.get("shards"), list):
        raise ValueError("it has no list of shards")
    counts: dict[str, int] = {}
    for shard in index["shards"]:
        name, images = (shard.get(key) for key in ("name", "images")) if isinstance(shard, dict) else (None, None)
        if not isinstance(name, str) or type(images) is not int:
            raise ValueError(f"{shard!r:.80} is no shard with a name and a number of images")
        if name in counts:
            raise ValueError(f"it lists {name} twice")
        if not 0 <= images < 2**40:
            raise ValueError(f"it counts {images} images in {name}")
        counts[name] = images
    if index.get("images", sum(counts.values())) != sum(counts.values()):
        raise ValueError(f"it counts {index['images']} images, but {sum(counts.values())} in its shards")
    classes = index.get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("its classes are no list of names")
    if len(set(classes)) < len(classes):
        raise ValueError("it names a class twice")
    return counts, classes


def read_shard(url: str) -> Iterator[tuple[str, bytes, int]]:
    """Read the images of a shard from its start.

    Args:
        url: One of :func:`shard_urls`.

    Yields:
        Name in the shard, bytes of the image file, and class index (0 where there is none).

    Raises:
        DataError: If the shard cannot be read, or a file in it is sparse or larger than :data:`MAX_FILE_BYTES`.
    """
    group_by_keys = import_webdataset().tariterators.group_by_keys
    try:
        for sample in group_by_keys(_files(url)):
            suffix = next((key for key in sample if f".{key}" in IMAGE_EXTENSIONS), None)
            if suffix is not None:
                yield f"{sample['__key__']}.{suffix}", sample[suffix], int(sample.get("cls", 0))
    except READ_ERRORS as error:
        reason = error.args[0] if error.args and isinstance(error, ValueError) else error
        raise DataError(f"The shard {url} cannot be read: {reason}") from error


def _files(url: str) -> Iterator[dict[str, Any]]:
    """Yield the files of a shard as webdataset does, but for those that are larger than what is stored of them."""
    if is_local(url) and not os.path.isfile(url):
        raise FileNotFoundError("there is no such file any more")
    stream = open(url, "rb") if is_local(url) else import_webdataset().gopen(url)  # noqa: SIM115
    with closing(stream) if is_local(url) else nullcontext(), tarfile.open(fileobj=stream, mode="r|*") as tar:
        for member in tar:
            if not member.isreg() or re.match(r"__[^/]*__($|/)", member.name):  # the latter is webdataset's own
                continue
            if member.issparse() or member.size > MAX_FILE_BYTES:
                raise DataError(
                    f"{member.name} in it claims {member.size:,} bytes; no file may be sparse or have more than "
                    f"{MAX_FILE_BYTES:,}."
                )
            content = tar.extractfile(member)
            assert content is not None
            yield {"fname": member.name, "data": content.read(), "__url__": url}
            tar.members = []  # type: ignore[attr-defined]  # else all of them are kept


class ShardDataset(IterableDataset[Any]):
    """The samples of one process, in an order that is a function of (seed, epoch).

    The shards are shuffled and laid end to end. Each process, and each of its loader processes, reads an equal piece of
    that row and shuffles it in a buffer. All processes get the same number of batches, and no image comes twice in an
    epoch; the rest that fills no global batch, another one each epoch, is left out.

    Args:
        shards: The shards.
        pipeline: What to do with an image file.
        batch_size: Images per process and batch.
        seed: Seed of the run.
        rank: This process.
        world_size: Number of processes.
        shuffle_buffer: Images to shuffle among, in each loader process; they are kept as files.
        on_bad_image: ``"error"``, or ``"skip"`` to take the next readable image instead.
        max_pixels: The most pixels that an image may have.
        accumulate: Batches of each process that make one optimizer step.
    """

    def __init__(
        self,
        shards: Shards,
        pipeline: PilPipeline,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer: int = 1000,
        on_bad_image: str = "error",
        max_pixels: int = MAX_PIXELS,
        accumulate: int = 1,
    ) -> None:
        self.shards = shards
        self.pipeline = pipeline
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.shuffle_buffer = shuffle_buffer
        self.on_bad_image = on_bad_image
        self.max_pixels = max_pixels
        #: Batches of this process in an epoch.
        self.batches = len(shards) // (batch_size * world_size * accumulate) * accumulate
        #: Epoch, and batches of it to leave out; in shared memory, where loader processes that stay alive see it.
        self.position: Tensor = torch.zeros(2, dtype=torch.int64).share_memory_()

    def __iter__(self) -> Iterator[tuple[Any, int, str]]:
        epoch, start = self.position.tolist()
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # The loader takes a batch from each of its processes in turn, beginning with the first, also after a restart.
        stream = (worker + start) % workers
        lengths = [self.batch_size * len(range(i, self.batches, workers)) for i in range(workers)]
        first = self.rank * self.batches * self.batch_size + sum(lengths[:stream])
        rng = Random(repr((self.seed, epoch, self.rank, stream)))
        files = self._read(epoch, first, first + lengths[stream])
        shuffled = import_webdataset().filters.shuffle(self.shuffle_buffer, rng=rng)(files)
        trained = self.batch_size * len(range(stream, start, workers))
        yield from self._views(epoch, islice(shuffled, trained, None))

    def _read(self, epoch: int, start: int, stop: int) -> Iterator[tuple[int, str, bytes, int]]:
        """Yield (index, name, bytes, class) of images start to stop of the epoch's row of shards."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        counts = self.shards.counts
        row = 0
        for shard in torch.randperm(len(counts), generator=generator).tolist():
            wanted = range(max(start - row, 0), min(stop - row, counts[shard]))
            row += counts[shard]
            if wanted:
                yield from self._read_part(shard, wanted)

    def _read_part(self, shard: int, wanted: range) -> Iterator[tuple[int, str, bytes, int]]:
        url, before = self.shards.urls[shard], sum(self.shards.counts[:shard])
        found = 0
        for place, (name, data, label) in enumerate(islice(read_shard(url), wanted.stop)):
            found = place + 1
            if self.shards.classes and not 0 <= label < len(self.shards.classes):
                raise DataError(f"{url}/{name} is of class {label}, but its index names {len(self.shards.classes)}.")
            if place >= wanted.start:
                yield before + place, f"{url}/{name}", data, label
        if found < wanted.stop:
            raise DataError(f"{url} holds {found} images, fewer than its index says. Make the index anew.")

    def _views(self, epoch: int, files: Iterator[tuple[int, str, bytes, int]]) -> Iterator[tuple[Any, int, str]]:
        waiting: list[int] = []  # images that are unreadable, whose place the next one takes
        sample: tuple[Any, int, str] | None = None
        for index, name, data, label in files:
            waiting.append(index)
            try:
                with pixel_limit(self.max_pixels):
                    if not self.pipeline.opens_with_pillow:  # which looks at the bound
                        Image.open(io.BytesIO(data)).close()
                    sample = self.pipeline.load(torch.frombuffer(bytearray(data), dtype=torch.uint8)), label, name
            except IMAGE_ERRORS as error:
                if self.on_bad_image != "skip":
                    raise DataError(f"{name} cannot be read: {error}. --data.on_bad_image skip goes on.") from error
                warnings.warn(f"Skipped {name}, which is unreadable: {error}", stacklevel=1)
                continue
            yield from self._augmented(epoch, waiting, sample)
            waiting = []
        if waiting:
            if sample is None:
                raise DataError(f"{self.shards.source}: the last images of epoch {epoch} are all unreadable.")
            yield from self._augmented(epoch, waiting, sample)

    def _augmented(self, epoch: int, indices: list[int], sample: Any) -> Iterator[tuple[Any, int, str]]:
        image, label, name = sample
        for index in indices:
            with pixel_limit(self.max_pixels):
                view = self.pipeline.view(image, (self.seed, epoch, index))
            yield view, label, name


class ShardLoader(ResumableLoader):
    """Batches of a :class:`ShardDataset`, from where the run has got to.

    Args:
        dataset: The samples.
        position: Returns (epoch, batches of it already trained on); asked whenever iteration starts.
        num_workers: Loader processes.
        pin_memory: Whether batches go to a CUDA device.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        position: Callable[[int], tuple[int, int]],
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            dataset,
            batch_size=dataset.batch_size,
            collate_fn=dataset.pipeline.collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
        )
        self.position = position
        # Lightning warns of loader processes that all read the same; these do not.
        warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")

    def __len__(self) -> int:
        return int(self.dataset.batches)  # type: ignore[attr-defined]

    def __iter__(self) -> Any:
        self.dataset.position[:] = torch.tensor(self.position(len(self)))  # type: ignore[attr-defined]
        yield from super().__iter__()
