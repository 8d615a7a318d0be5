"""What pretraining brings in the demo: mIoU on scenes of digits, from pretrained and from random weights, over seeds.

python benchmarks/digit_scenes.py --seeds 0 1 2

Needs the demo's backbone and scenes (make segment-demo). Finished runs are not trained again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

CONFIG = Path(__file__).parent.parent / "mmseg_configs" / "nepa_tiny_digits_seg.py"


def final_miou(work_dir: Path, iterations: int) -> float | None:
    """Return the mIoU after the last iteration, or None if the run is not finished."""
    rows = [json.loads(line) for file in sorted(work_dir.glob("*/vis_data/2*.json")) for line in file.open()]
    scores = [row["mIoU"] for row in rows if "mIoU" in row and row["step"] == iterations]
    return scores[-1] if scores else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/digit_scenes"))
    args = parser.parse_args()
    from mmengine.config import Config

    iterations = Config.fromfile(CONFIG).train_cfg.max_iters
    print(
        f"mIoU in % after {iterations} iterations\n\n| weights | {' | '.join(f'seed {s}' for s in args.seeds)} | mean |"
    )
    print("| --- " * (len(args.seeds) + 2) + "|")
    for name, options in (("pretrained", []), ("random", ["model.backbone.init_cfg=None"])):
        scores = []
        for seed in args.seeds:
            work_dir = args.runs / f"{name}-{seed}"
            if final_miou(work_dir, iterations) is None:
                command = [sys.executable, "-m", "mim", "train", "mmsegmentation", CONFIG, "--work-dir", work_dir]
                command += ["--resume", "--cfg-options", f"randomness.seed={seed}", *options]
                work_dir.mkdir(parents=True, exist_ok=True)
                with (work_dir / "train.log").open("a") as log:
                    subprocess.run([str(c) for c in command], check=True, stdout=log, stderr=subprocess.STDOUT)
            score = final_miou(work_dir, iterations)
            if score is None:
                sys.exit(f"error: {work_dir} ended without a final score; see {work_dir / 'train.log'}.")
            scores.append(score)
        print(f"| {name} | {' | '.join(f'{s:.1f}' for s in scores)} | {statistics.mean(scores):.1f} |", flush=True)


if __name__ == "__main__":
    main()
