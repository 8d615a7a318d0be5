"""Memory of an evaluation: measured against what is calculated before it starts, over growing numbers of images.

python benchmarks/evaluation_memory.py --out benchmarks/evaluation_memory.json

Runs kNN, linear probe and the readout of all depths, on images of random pixels, with a ViT whose tokens are as wide as
ViT-B's but few: its features take as much memory, and little time. Every run is a process of its own, whose peak of
anonymous memory (files that are mapped can be taken back) is compared with that of a run on almost no images.
The last tables are the calculation for ViT-B on ImageNet's 1.28 million images; --images without a number prints them
alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from nepa_plugin.evaluation import EvaluationOptions, LinearOptions, evaluate
from nepa_plugin.evaluation.memory import GB, Sizes, memory_steps

MODEL = {"img_size": 32, "patch_size": 16, "embed_dim": 768, "depth": 2, "num_heads": 12}
IMAGENET = Sizes(train=1_281_167, val=50_000, classes=1000, width=768, tokens=257, depths=14, pools=2)
CLASSES = 10


def folder(root: Path, train: int, val: int) -> Path:
    """Write images of random pixels, 32x32, of ten classes."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            path = root / split / str(i % CLASSES) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return root


def options(solver: str, cache: bool) -> EvaluationOptions:
    linear = LinearOptions(solver=solver, epochs=1, readout_epochs=1, batch_size=256, C=1e-6)  # type: ignore[arg-type]
    return EvaluationOptions(accelerator="cpu", batch_size=64, cache=cache, linear=linear)


def protocols(solver: str) -> list[str]:
    return ["knn", "readout"] if solver == "sgd" else ["knn", "linear", "readout"]


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def child(data: str, solver: str, cache: bool) -> None:
    """Evaluate in this process, and print the peak of its anonymous memory, in bytes."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    torch.manual_seed(0)
    model = timm.create_model("nepa_vit_tiny_patch14_224", **MODEL).eval()
    evaluate(model, data, protocols(solver), options(solver, cache))
    done.set()
    watcher.join()
    print(json.dumps(peak[0]))


def measured(data: Path, solver: str, cache: bool) -> int:
    with tempfile.TemporaryDirectory() as kept:
        command = [sys.executable, __file__, "--child", str(data), "--solver", solver, *(["--cache"] if cache else [])]
        result = subprocess.run(
            command, env=os.environ | {"NEPA_PLUGIN_CACHE": kept}, check=True, stdout=subprocess.PIPE, text=True
        )
    return int(result.stdout.splitlines()[-1])


def calculated(train: int, val: int, solver: str, cache: bool) -> float:
    """Return the largest step's bytes, the paths included."""
    patches = (MODEL["img_size"] // MODEL["patch_size"]) ** 2
    sizes = Sizes(train, val, CLASSES, MODEL["embed_dim"], patches + 1, MODEL["depth"] + 2, 2)
    pairs = sizes.depths * sizes.pools if solver == "logistic" else 1
    always, *steps = memory_steps(sizes, protocols(solver), options(solver, cache), pairs, False)
    kept = next(step.host for step in steps if step.name == "features") if not cache else 0
    return always.host + max(step.host + (kept if step.name != "features" else 0) for step in steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="*", default=[4_000, 8_000, 16_000])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child")
    parser.add_argument("--solver", default="logistic")
    parser.add_argument("--cache", action="store_true")
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.solver, args.cache)
    console, rows = Console(width=120), []
    cases = [("logistic", False), ("logistic", True), ("sgd", True)]
    with tempfile.TemporaryDirectory() as root:
        few = folder(Path(root) / "few", 200, 100)
        base = {case: measured(few, *case) - calculated(200, 100, *case) for case in cases if args.images}
        for count in args.images:
            data = folder(Path(root) / str(count), count, count // 5)
            for case in cases:
                start = time.perf_counter()
                peak = measured(data, *case) - base[case]
                row = {"train": count, "val": count // 5, "solver": case[0], "cache": case[1]}
                row |= {"measured": peak, "calculated": calculated(count, count // 5, *case)}
                rows.append(row | {"seconds": time.perf_counter() - start})
    table = Table("images", "solver", "cache", "measured, GB", "calculated, GB", title="Peak over a run on 200 images")
    for row in rows:
        kept = "yes" if row["cache"] else "no"
        values = (f"{row[key] / GB:.3f}" for key in ("measured", "calculated"))
        table.add_row(f"{row['train']} + {row['val']}", row["solver"], kept, *values)
    console.print(table)
    places = {"the CPU alone": IMAGENET, "one CUDA device": replace(IMAGENET, cuda=True)}
    steps = {
        place: memory_steps(sizes, ["knn", "linear", "readout"], EvaluationOptions(), 1, False)
        for place, sizes in places.items()
    }
    for place, found in steps.items():
        table = Table("step", "host, GB", "device, GB", title=f"ViT-B on ImageNet: kNN, linear, readout on {place}")
        for step in found:
            table.add_row(step.name, f"{step.host / GB:.1f}", f"{step.device / GB:.1f}")
        console.print(table)
    if args.out:
        record = {
            "runs": rows,
            "imagenet": {k: {s.name: [s.host, s.device] for s in found} for k, found in steps.items()},
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
