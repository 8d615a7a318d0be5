"""What pretraining brings in the demo: mIoU on scenes of digits, from pretrained and from random weights, over seeds.

python benchmarks/digit_scenes.py --seeds 0 1 2

Needs the demo's backbone and scenes (make segment-demo). Finished runs are not trained again, and those of another
config, backbone or other scenes are refused.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from once import ROOT, weights

from nepa_plugin.data.files import files_signature
from nepa_plugin.runtime.files import write_json

CONFIG = ROOT / "mmseg_configs" / "nepa_tiny_digits_seg.py"


def curve(work_dir: Path) -> dict[int, float]:
    """Return the mIoU in per cent by training iteration."""
    rows = [json.loads(line) for file in sorted(work_dir.glob("*/vis_data/2*.json")) for line in file.open()]
    return {row["step"]: row["mIoU"] for row in rows if "mIoU" in row}


def check(work_dir: Path, asked: dict[str, Any]) -> None:
    """Note what a run depends on, or end with an error where there is a run of something else."""
    file = work_dir.with_name(f"{work_dir.name}.request.json")
    if file.is_file() and json.loads(file.read_text()) == asked:
        return
    if work_dir.exists():
        sys.exit(f"error: {work_dir} is of another config, backbone, or other scenes: give --runs another folder.")
    work_dir.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, asked)


def train(work_dir: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "mim", "train", "mmsegmentation", CONFIG, "--work-dir", work_dir]
    command += ["--resume", "--cfg-options", *options]
    work_dir.mkdir(parents=True, exist_ok=True)
    with (work_dir / "train.log").open("a") as log:
        if subprocess.run([str(c) for c in command], stdout=log, stderr=subprocess.STDOUT).returncode:
            sys.exit(f"error: training failed; see {work_dir / 'train.log'}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/digit_scenes"))
    args = parser.parse_args()
    from mmengine.config import Config

    config = Config.fromfile(CONFIG)
    schedule, backbone = config.train_cfg, Path(config.model.backbone.init_cfg.checkpoint)
    if not backbone.is_dir():
        sys.exit(f"error: no backbone {backbone}: make segment-demo trains it.")
    scenes = Path(config.train_dataloader.dataset.data_root)
    files = sorted(str(file.relative_to(scenes)) for file in scenes.rglob("*.png"))
    if not files:
        sys.exit(f"error: no scenes in {scenes}: make segment-demo draws them.")
    sizes = files_signature(scenes, files, times=False)
    depends = {"config": config.pretty_text, "backbone": weights(backbone), "scenes": sizes}
    steps = range(schedule.val_interval, schedule.max_iters + 1, schedule.val_interval)
    print(f"| weights | seed | {' | '.join(f'step {step}' for step in steps)} |")
    print("| --- " * (len(steps) + 2) + "|")
    for name, options in (("pretrained", []), ("random", ["model.backbone.init_cfg=None"])):
        curves = []
        for seed in args.seeds:
            work_dir = args.runs / f"{name}-{seed}"
            check(work_dir, depends | {"options": [f"randomness.seed={seed}", *options]})
            if schedule.max_iters not in curve(work_dir):
                train(work_dir, [f"randomness.seed={seed}", *options])
            curves.append([curve(work_dir)[step] for step in steps])
            print(f"| {name} | {seed} | {' | '.join(f'{score:.1f}' for score in curves[-1])} |", flush=True)
        means = [statistics.mean(scores) for scores in zip(*curves, strict=True)]
        print(f"| {name} | mean | {' | '.join(f'{mean:.1f}' for mean in means)} |", flush=True)


if __name__ == "__main__":
    main()
