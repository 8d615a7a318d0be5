"""Time and memory of one segmentation training step on random images, for patch sizes side by side.

python benchmarks/segmentation.py mmseg_configs/nepa_vit_b_ade20k.py --patch-size 14 16 --iterations 100

The patch sizes take turns, a step each, so that a busy machine slows all of them alike. On CUDA the step is in
bfloat16, as the config says, and peak memory is printed; on the CPU use a small --batch-size and few --iterations.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def now() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def allocated() -> int:
    return torch.cuda.memory_allocated() if DEVICE == "cuda" else 0


class Candidate:
    """A segmentor with its optimizer, and what a step of it needs."""

    def __init__(self, config: str, patch_size: int, batch_size: int, size: int) -> None:
        from mmseg.registry import MODELS
        from mmseg.structures import SegDataSample

        before = allocated()
        cfg = Config.fromfile(config)
        init_default_scope("mmseg")
        multiple = -(-size // patch_size) * patch_size
        cfg.model.backbone.update(init_cfg=None, patch_size=patch_size, img_size=multiple)
        cfg.model.data_preprocessor.size = (size, size)
        self.model = revert_sync_batchnorm(MODELS.build(cfg.model)).to(DEVICE).train()
        self.wrapper = build_optim_wrapper(self.model, cfg.optim_wrapper)
        classes = cfg.model.decode_head.num_classes
        self.data = {
            "inputs": list(torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8)),
            "data_samples": [
                SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, classes, (1, size, size))))
                for _ in range(batch_size)
            ],
        }
        self.patch_size, self.tokens = patch_size, (multiple // patch_size) ** 2 + 1
        self.seconds: list[float] = []
        self.step()
        self.resident, self.peak = allocated() - before, 0

    def step(self) -> float:
        start = now()
        self.model.train_step(self.data, self.wrapper)
        self.wrapper.optimizer.zero_grad(set_to_none=True)
        return now() - start

    def timed_step(self, resident: int) -> None:
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.seconds.append(self.step())
        if DEVICE == "cuda":  # without what the other candidates keep on the device
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - resident + self.resident)

    def attention_ops(self) -> list[str]:
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])
        with profile(activities=activities) as trace:
            self.step()
        words = ("attention", "flash", "fmha", "sdpa")
        return sorted({e.key for e in trace.key_averages() if any(w in e.key.lower() for w in words)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--patch-size", type=int, nargs="+", default=[14, 16])
    parser.add_argument("--size", type=int, default=512, help="side of the images in pixels")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    import nepa_plugin.segmentation  # noqa: F401  # before mmseg, which needs its compatibility

    candidates = [Candidate(args.config, p, args.batch_size, args.size) for p in args.patch_size]
    resident = allocated()
    for _ in range(args.iterations):
        for candidate in candidates:
            candidate.timed_step(resident)
    table = Table(title=f"{args.config}, {args.batch_size} x {args.size} x {args.size} on {DEVICE}")
    for column in ("patch", "tokens", "seconds per step, median", "quartiles", "ratio to first", "peak memory"):
        table.add_column(column, justify="right")
    rows: list[dict[str, Any]] = []
    for c in candidates:
        quarters = statistics.quantiles(c.seconds, n=4) if len(c.seconds) > 1 else c.seconds * 3
        ratio = statistics.median(b / a for a, b in zip(candidates[0].seconds, c.seconds, strict=True))
        rows.append(
            {
                "patch_size": c.patch_size,
                "tokens": c.tokens,
                "seconds": quarters[1],
                "quartiles": quarters[::2],
                "ratio": ratio,
                "peak_bytes": c.peak,
                "attention": c.attention_ops(),
            }
        )
        peak = f"{c.peak / 2**30:.1f} GiB" if c.peak else "-"
        table.add_row(
            str(c.patch_size), str(c.tokens), f"{quarters[1]:.3f}", f"{quarters[0]:.3f} - {quarters[2]:.3f}",
            f"{ratio:.2f}", peak,
        )  # fmt: skip
    Console().print(table)
    for row in rows:
        print(f"patch {row['patch_size']}: attention in {', '.join(row['attention'])}")
    if args.out:
        device = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()
        report = {"arguments": vars(args) | {"out": None}, "device": device, "torch": torch.__version__, "rows": rows}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
