"""Image folders into shards: tar files for webdataset, and the index that training reads."""

import random
from pathlib import Path
from typing import Any

from nepa_plugin.data.errors import DataError
from nepa_plugin.data.files import MAX_PIXELS, check_files, class_names, image_folder
from nepa_plugin.data.shards import INDEX, read_shard
from nepa_plugin.data.sources import import_webdataset, shard_name, shard_urls
from nepa_plugin.runtime.files import whole_folder, write_json
from nepa_plugin.runtime.places import check_file, check_folder
from nepa_plugin.runtime.ranges import PositiveInt, check_hints


def make_shards(
    folder: str | Path,
    out: str | Path,
    images_per_shard: int = 1000,
    seed: int = 0,
    skip_bad: bool = False,
    max_image_pixels: int = MAX_PIXELS,
) -> dict[str, Any]:
    """Pack an image folder into ``images-000000.tar`` and so on, in random order, and ``index.json``.

    The order is random because training shuffles shards, and images only within a buffer. Files are stored as they are.

    Args:
        folder: Images: one sub-folder per class, or flat (no labels).
        out: Folder to create.
        images_per_shard: Images in each; at least as many shards as loader processes over all devices are needed.
        seed: Seed of the order.
        skip_bad: Leave out files that are no readable images, instead of refusing.
        max_image_pixels: The most pixels that an image may have; one with more is no readable image.

    Returns:
        The index: ``shards`` (``name`` and number of ``images`` of each), ``images``, and the names of the ``classes``.

    Raises:
        DataError: If there is no image, a file is unreadable, or ``out`` exists.
    """
    values = {"images_per_shard": images_per_shard, "seed": seed, "max_image_pixels": max_image_pixels}
    check_hints({name: PositiveInt for name in values} | {"seed": int}, values)
    images, target = image_folder(folder, "make_shards", max_image_pixels), Path(out)
    if target.exists():
        raise DataError(f"{target} exists. Choose another folder for the shards, or remove it.")
    check_folder(target, "the shards' folder")
    check = check_files(folder, images.get_filenames(), max_image_pixels)
    bad = check.bad
    if bad and not skip_bad:
        raise check.refusal(folder, "Remove or repair them, or pass --skip_bad.")
    samples = [
        sample for sample, name in zip(images.dataset.samples, images.get_filenames(), strict=True) if name not in bad
    ]
    if not samples:
        raise DataError(f"{folder} holds no readable image.")
    random.Random(seed).shuffle(samples)
    webdataset = import_webdataset()
    with whole_folder(target) as part:  # what is there is always complete
        pattern = str(part / "images-%06d.tar")
        with webdataset.ShardWriter(pattern, images_per_shard, float("inf"), verbose=0, mtime=0) as writer:
            for i, (path, label) in enumerate(samples):
                suffix = Path(path).suffix[1:].lower()
                writer.write({"__key__": f"{i:09d}", suffix: Path(path).read_bytes(), "cls": str(label).encode()})
        names = sorted(path.name for path in part.iterdir())
        counts = [min(images_per_shard, len(samples) - i * images_per_shard) for i in range(len(names))]
        index = _index(dict(zip(names, counts, strict=True)), class_names(images))
        write_json(part / INDEX, index)
    return index


def index_shards(source: str, out: str | Path, allow_pipe: bool = False) -> dict[str, Any]:
    """Write the index of shards that something else has made, by reading them through once; it has no class names.

    Args:
        source: Folder, pattern, URL or ``pipe:`` command of shards.
        out: The file to write; training looks for it as ``index.json`` beside the shards.
        allow_pipe: Whether ``pipe:`` commands may be run.

    Returns:
        The index.

    Raises:
        DataError: If a shard is missing or unreadable, or ``out`` exists.
    """
    urls = shard_urls(source, allow_pipe)
    if Path(out).exists():
        raise DataError(f"{out} exists. Choose another file for the index, or remove it.")
    check_file(out, "the index")
    index = _index({shard_name(url): sum(1 for _ in read_shard(url)) for url in urls}, [])
    write_json(out, index)
    return index


def _index(counts: dict[str, int], classes: list[str]) -> dict[str, Any]:
    shards = [{"name": name, "images": count} for name, count in counts.items()]
    return {"shards": shards, "images": sum(counts.values()), "classes": classes}
