"""Does pretraining on CamVid's own frames help segmenting them? A small ViT, against random weights, on a CPU.

python benchmarks/camvid.py data/camvid --out runs/camvid --seeds 0 1

Each row is pretrained on the 367 training frames without their labels, at 224x224; then a light head on four depths is
trained with the backbone frozen, and the whole network (`nepa_plugin.segmentation.transfer` with
mmseg_configs/nepa_small_camvid.py). What has finished is not run again. OUT/results.csv takes all rows that there are,
of calls before, too; their means are printed.
"""

import argparse
import os
from pathlib import Path
from statistics import mean

from mmengine.config import Config
from once import ROOT, keep, once, weights
from rows import BETTER, config_of, of_size

from nepa_plugin.checkpoints import load_backbone, save_backbone, untrained_like, weights_hash
from nepa_plugin.training.configs import read_config

ROWS = ["nepa", *BETTER, "mae"]
SIZE = of_size(embed_dim=192, depth=6, num_heads=3)
CONFIG = ROOT / "mmseg_configs" / "nepa_small_camvid.py"


def pretrain(row: str, seed: int, given: argparse.Namespace) -> Path:
    """Pretrain a row, unless it has been, and return its backbone."""
    config = config_of(row)
    folder = given.out / config.stem.removesuffix("_cifar10") / f"seed{seed}"
    command = [str(ROOT / "tools" / "pretrain.py"), "--config", str(config)]
    command += ["--data.train_dir", str(given.source / "images" / "training")]
    command += ["--model.img_size", "224", "--model.patch_size", "16", *SIZE]
    command += ["--data.batch_size_per_device", "32", "--global_batch_size", "32", "--model.base_lr", "8e-3"]
    command += ["--model.warmup_fraction", "0.1", "--trainer.max_epochs", str(given.epochs)]
    command += ["--seed_everything", str(seed), "--trainer.log_every_n_steps", "5"]
    once(folder, command, read_config(config), "summary.json", ["--run_dir", str(folder), "--ckpt_path", "auto"])
    return folder / "backbone"


def untrained(like: Path, seed: int, given: argparse.Namespace) -> Path:
    """Write the same network with fresh weights, and return its folder."""
    model = load_backbone(like)
    folder = given.out / f"untrained {type(model).__name__}" / f"seed{seed}" / "backbone"
    fresh = untrained_like(model, seed=seed)
    if not folder.is_dir():
        save_backbone(fresh, folder)
    elif weights_hash(fresh) != weights_hash(load_backbone(folder)):
        raise SystemExit(f"error: {like} is another network than that of {folder}: give it an --out of its own.")
    return folder


def transfer(backbone: Path, seed: int, given: argparse.Namespace) -> dict[str, float]:
    """Segment with a backbone, frozen and tuned, unless that has been done, and return the mean IoUs."""
    found = {}
    for name, options in (("frozen", ["--frozen"]), ("tuned", [])):
        folder = backbone.parent / "segmentation" / name
        command = ["-m", "nepa_plugin.segmentation.transfer", str(CONFIG), *options, "--seed", str(seed)]
        places = ["--backbone", str(backbone), "--work-dir", str(folder)]
        config = [Config.fromfile(CONFIG).pretty_text, weights(backbone)]
        found[name] = once(folder, command, config, "result.json", places)["mIoU"]
    return found


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", type=Path, help="CamVid: images/ and annotations/, each with training/ and validation/"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/camvid"))
    parser.add_argument(
        "--rows", nargs="+", default=ROWS, metavar="NAME", help="lightly_configs/NAME_cifar10.yaml each, or a path"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=60, help="of pretraining, 11 steps each")
    given = parser.parse_args()
    given.source = given.source.resolve()
    if not (given.source / "images" / "training").is_dir():
        raise SystemExit(f"error: no folder {given.source / 'images' / 'training'}.")
    for row in given.rows:
        config_of(row)
    os.environ["CAMVID"] = str(given.source)  # where the config of segmentation looks
    rows: list[dict[str, str]] = []
    for seed in given.seeds:
        trained = [pretrain(row, seed, given) for row in given.rows]
        backbones = {backbone.parents[1].name: backbone for backbone in trained}
        for like in list(backbones.values()):
            floor = untrained(like, seed, given)
            backbones[floor.parents[1].name] = floor
        for row, backbone in backbones.items():
            found = {"row": row, "seed": seed, **transfer(backbone, seed, given)}
            print(found, flush=True)
            rows = keep(given.out / "results.csv", found, ["row", "seed"])
    for row in dict.fromkeys(each["row"] for each in rows):
        own = [each for each in rows if each["row"] == row]
        means = {mode: mean(float(each[mode]) for each in own) for mode in ("frozen", "tuned")}
        print(f"{row}: mIoU frozen {means['frozen']:.1f}, tuned {means['tuned']:.1f} ({len(own)} seeds)")


if __name__ == "__main__":
    main()
