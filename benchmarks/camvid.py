"""Does pretraining on CamVid's own frames help segmenting them? A small ViT, against random weights, on a CPU.

python benchmarks/camvid.py data/camvid --out runs/camvid --seeds 0 1

Each row is pretrained on the 367 training frames without their labels, at 192x192; then a light head on four depths is
trained with the backbone frozen, and the whole network (`nepa_plugin.segmentation.transfer` with
mmseg_configs/nepa_small_camvid.py). What has finished is not run again. Writes OUT/results.csv and prints the means.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

from nepa_plugin.checkpoints import load_backbone, save_backbone, untrained_like

ROOT = Path(__file__).parents[1]
ROWS = ["nepa", "nepa_plus", "mae"]
SIZE = "{embed_dim: 192, depth: 6, num_heads: 3}"
CONFIG = ROOT / "mmseg_configs" / "nepa_small_camvid.py"


def call(log: Path, *command: str, **environment: str) -> None:
    """Run a command to its end; what it prints goes into a log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        env = dict(os.environ, PYTHONPATH=str(ROOT), **environment)
        if subprocess.run([sys.executable, *command], stdout=file, stderr=file, env=env).returncode:
            raise SystemExit(f"error: {' '.join(command[:2])} failed; see {log}")


def pretrain(row: str, seed: int, given: argparse.Namespace) -> Path:
    """Pretrain a row, unless it has been, and return its backbone."""
    folder = given.out / row / f"seed{seed}"
    if not (folder / "summary.json").is_file():
        call(
            folder.with_suffix(".log"),
            *(str(ROOT / "tools" / "pretrain.py"), "--config", str(ROOT / "lightly_configs" / f"{row}_cifar10.yaml")),
            *("--data.train_dir", str(given.source / "images" / "training"), "--run_dir", str(folder)),
            *("--model.img_size", "192", "--model.patch_size", "16", "--model.backbone_args", SIZE),
            *("--data.batch_size_per_device", "32", "--global_batch_size", "32", "--model.base_lr", "8e-3"),
            *("--model.warmup_fraction", "0.1", "--trainer.max_epochs", str(given.epochs), "--ckpt_path", "auto"),
            *("--seed_everything", str(seed), "--trainer.log_every_n_steps", "5"),
        )
    return folder / "backbone"


def untrained(like: Path, seed: int, given: argparse.Namespace) -> Path:
    """Write the same network with fresh weights, and return its folder."""
    model = load_backbone(like)
    folder = given.out / f"untrained {type(model).__name__}" / f"seed{seed}" / "backbone"
    if not folder.is_dir():
        save_backbone(untrained_like(model, seed=seed), folder)
    return folder


def transfer(backbone: Path, seed: int, given: argparse.Namespace) -> dict[str, float]:
    """Segment with a backbone, frozen and tuned, unless that has been done, and return the mean IoUs."""
    found = {}
    for name, options in (("frozen", ["--frozen"]), ("tuned", [])):
        folder = backbone.parent / "segmentation" / name
        if not (folder / "result.json").is_file():
            module = ["-m", "nepa_plugin.segmentation.transfer", str(CONFIG), "--backbone", str(backbone), *options]
            module += ["--work-dir", str(folder), "--seed", str(seed)]
            call(folder.with_suffix(".log"), *module, CAMVID=str(given.source))
        found[name] = json.loads((folder / "result.json").read_text())["mIoU"]
    return found


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", type=Path, help="CamVid: images/ and annotations/, each with training/ and validation/"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/camvid"))
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=60, help="of pretraining, 11 steps each")
    given = parser.parse_args()
    given.source = given.source.resolve()
    if not (given.source / "images" / "training").is_dir():
        raise SystemExit(f"error: no folder {given.source / 'images' / 'training'}.")
    rows: list[dict[str, object]] = []
    for seed in given.seeds:
        backbones = {row: pretrain(row, seed, given) for row in given.rows}
        for like in list(backbones.values()):
            floor = untrained(like, seed, given)
            backbones[floor.parents[1].name] = floor
        for row, backbone in backbones.items():
            rows.append({"row": row, "seed": seed, **transfer(backbone, seed, given)})
            print(rows[-1], flush=True)
            with (given.out / "results.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    for row in dict.fromkeys(each["row"] for each in rows):
        own = [each for each in rows if each["row"] == row]
        means = {mode: mean(float(str(each[mode])) for each in own) for mode in ("frozen", "tuned")}
        print(f"{row}: mIoU frozen {means['frozen']:.1f}, tuned {means['tuned']:.1f} ({len(own)} seeds)")


if __name__ == "__main__":
    main()
