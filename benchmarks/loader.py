"""Images per second of the training loader alone, on one core: lightly's PIL path and this package's pipelines.

python benchmarks/loader.py --out loader.json
python benchmarks/loader.py --images /data/photos --imagenet-size

The candidates take turns, a batch each, in one process without loader processes and with one torch thread, so that a
busy machine slows all of them alike; the ratio is to lightly in the same round. Without --images, JPEGs of ImageNet's
mean size (470x390 pixels, 108 KB) are made of gradients and noise; --imagenet-size makes them of the photographs given.
Files are read more than once, so from memory: what a disk or network adds is not measured.
"""

import argparse
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from lightly.data import LightlyDataset
from lightly.data.multi_view_collate import MultiViewCollate
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from nepa_plugin.data import DataError, EpochBatchSampler, NEPATransform, SeededDataset, image_folder
from nepa_plugin.data.packing import make_shards
from nepa_plugin.data.pipelines import FileDataset, PilPipeline, build_pipeline, decode
from nepa_plugin.data.shards import ShardDataset, ShardLoader, open_shards
from nepa_plugin.runtime.files import write_json
from nepa_plugin.runtime.provenance import provenance

SIZE, KILOBYTES = (470, 390), 108  # ImageNet-1K: mean width, height and file size


def encode(image: Image.Image, path: Path) -> None:
    """Write a JPEG of ImageNet's mean size, with the quality that comes nearest to its bytes from below."""
    low, high = 1, 100
    while high - low > 1:
        quality = (low + high) // 2
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        low, high = (quality, high) if buffer.tell() <= KILOBYTES * 1000 else (low, quality)
    image.save(path, "JPEG", quality=low)


def made_up(seed: int) -> Image.Image:
    """Return gradients with noise of several sizes, whose contrast falls with frequency as in photographs."""
    rng = np.random.default_rng(seed)
    width, height = SIZE
    pixels = np.full((height, width, 3), 128.0)
    for side in (2, 4, 8, 16, 32, 64, 128, 256, 470):
        noise = rng.normal(0, 48 / side**0.3, (side, side, 3))
        for channel in range(3):
            layer = Image.fromarray(noise[..., channel].astype(np.float32))
            pixels[..., channel] += np.asarray(layer.resize(SIZE, Image.Resampling.BICUBIC))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def prepare(folder: Path, source: LightlyDataset | None, count: int) -> None:
    (folder / "images").mkdir()
    for i in range(count):
        image = source[i][0].resize(SIZE, Image.Resampling.BICUBIC) if source else made_up(i)
        encode(image, folder / "images" / f"{i:05d}.jpg")


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def loader(dataset: Any, batch_size: int, collate: Callable[[list[Any]], Any]) -> Iterator[Any]:
    sampler = EpochBatchSampler(len(dataset), batch_size, seed=0)
    return endless(DataLoader(dataset, batch_sampler=sampler, collate_fn=collate))


def candidates(images: LightlyDataset, shards: Path, batch_size: int) -> dict[str, Callable[[], Any]]:
    """Return what each candidate does for a batch."""
    transform, everything = NEPATransform(), list(range(len(images)))
    plain = LightlyDataset(images.input_dir, transform=transform)
    lightly = endless(
        DataLoader(plain, batch_size=batch_size, shuffle=True, drop_last=True, collate_fn=MultiViewCollate())
    )
    pil = loader(SeededDataset(images, transform, 0, everything), batch_size, MultiViewCollate())
    steps: dict[str, Callable[[], Any]] = {"lightly": lambda: next(lightly), "pil": lambda: next(pil)}
    cpu = torch.device("cpu")

    def add(name: str, pipeline: PilPipeline, batches: Iterator[Any], finished: bool) -> None:
        def step() -> Any:
            views, _, names = next(batches)
            return pipeline.finish(views, cpu, names) if finished else views

        steps[name] = step

    for name in ("tensor", "device"):
        pipeline = build_pipeline(name, transform, "NEPA")
        dataset = FileDataset(images, pipeline, 0, everything)
        for finished in (False, True):
            label = f"{name}, finished on the CPU" if finished else name
            add(label, pipeline, loader(dataset, batch_size, pipeline.collate), finished)
    for name in ("pil", "tensor", "device"):
        pipeline = build_pipeline(name, transform, "NEPA")
        packed = ShardDataset(open_shards(str(shards)), pipeline, batch_size, seed=0)
        add(f"shards, {name}", pipeline, endless(ShardLoader(packed, lambda length: (0, 0))), False)
    # The floor: no loader on this decoder can take less time.
    paths = itertools.cycle(path for path, _ in images.dataset.samples)
    steps["read and decode only"] = lambda: [
        decode(torchvision.io.read_file(path)) for path in itertools.islice(paths, batch_size)
    ]
    return steps


def spread(values: list[float]) -> dict[str, float]:
    quarters = statistics.quantiles(values, n=4)
    return {"median": statistics.median(values), "lower_quartile": quarters[0], "upper_quartile": quarters[2]}


def measure(steps: dict[str, Callable[[], Any]], batch_size: int, rounds: int) -> dict[str, Any]:
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:  # the first round opens files and fills buffers
                rates[name].append(batch_size / (time.perf_counter() - start))
    ratios = {name: [a / b for a, b in zip(r, rates["lightly"], strict=True)] for name, r in rates.items()}
    return {name: {"images_per_second": spread(rates[name]), "ratio": spread(ratios[name])} for name in steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="image folder to read; by default made-up images")
    parser.add_argument("--imagenet-size", action="store_true", help="re-encode them at ImageNet's mean size")
    parser.add_argument("--count", type=int, default=256, help="images to make")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="nepa-loader-") as tmp:
        try:
            source = image_folder(args.images, "--images") if args.images else None
            folder = args.images
            if source is None or args.imagenet_size:
                prepare(Path(tmp), source, min(args.count, len(source) if source else args.count))
                folder = Path(tmp) / "images"
            images = image_folder(folder, "--images")
            if len(images) < args.batch_size:
                raise DataError(f"{len(images)} images are fewer than a batch: lower --batch-size.")
            make_shards(folder, Path(tmp) / "shards", images_per_shard=args.batch_size)
        except DataError as error:
            parser.error(str(error))
        sizes = [Path(path).stat().st_size for path, _ in images.dataset.samples]
        steps = candidates(images, Path(tmp) / "shards", args.batch_size)
        result = measure(steps, args.batch_size, args.rounds)
    table = Table("loader", "images/s", "quartiles", "x lightly", "quartiles")
    for name, row in result.items():
        rate, ratio = row["images_per_second"], row["ratio"]
        table.add_row(
            name,
            f"{rate['median']:.0f}",
            f"{rate['lower_quartile']:.0f} to {rate['upper_quartile']:.0f}",
            f"{ratio['median']:.2f}",
            f"{ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f}",
        )
    Console().print(table)
    print(f"{len(images)} images of {statistics.mean(sizes) / 1000:.0f} KB; batches of {args.batch_size}; one core")
    if args.out:
        about = {
            "images": Path(args.images).name if args.images else "made up",
            "mean_bytes": statistics.mean(sizes),
            "rounds": args.rounds,
        }
        write_json(args.out, {"loaders": result, **about, "batch_size": args.batch_size, **provenance()})


if __name__ == "__main__":
    main()
