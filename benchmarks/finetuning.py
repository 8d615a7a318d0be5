"""Fine-tuning from pretrained weights beside the same network from scratch, over seeds and lengths.

python benchmarks/finetuning.py --pretrain nepa_digits --finetune vit_digits --data digits --epochs 5 20 --seeds 0 1 2
python benchmarks/finetuning.py --pretrain nepa_cifar10 --finetune vit_cifar10 --data FOLDER --epochs 12 \\
    --variant causal:--model.attention=causal --pretrain_options "--trainer.max_epochs 20"

Every run is `nepa pretrain` or `nepa finetune` in a process of its own, in one folder; what has finished is not run
again, and what was stopped goes on. The CSV takes a row per run, beside those that it has, and the means are printed.
"""

import argparse
import json
import shlex
from pathlib import Path
from statistics import mean
from typing import Any

from once import ROOT, keep, once, weights

from nepa_plugin.runtime.shipped import find
from nepa_plugin.training.configs import read_config


def run(tool: str, config: str, folder: Path, *args: str, backbone: Path | None = None) -> Any:
    """Run a command to its end in a folder, unless it has been, and return its summary."""
    depends = [read_config(find(config)), weights(backbone) if backbone else None]
    command = [str(ROOT / "tools" / f"{tool}.py"), *args, "--config", config, "--trainer.enable_model_summary", "false"]
    return once(folder, command, depends, "summary.json", ["--run_dir", str(folder), "--ckpt_path", "auto"])


def images(data: str) -> list[str]:
    """Return how pretraining is told of the images."""
    if data == "digits":
        return ["--data.demo", "digits"]
    val = "val" if (Path(data) / "val").is_dir() else "test"
    return ["--data.train_dir", f"{data}/train", "--data.val_dir", f"{data}/{val}"]


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain", required=True, help="config of nepa pretrain")
    parser.add_argument("--pretrain_options", default="", help="further options of it, in one string")
    parser.add_argument("--finetune", required=True, help="config of nepa finetune")
    parser.add_argument("--finetune_options", default="", help="further options of it, in one string")
    parser.add_argument("--data", required=True, help="'digits', or a folder with train/ and val/ or test/")
    parser.add_argument("--epochs", type=int, nargs="+", default=[20], help="lengths of fine-tuning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variant", action="append", default=[], metavar="NAME:OPTIONS", help="fine-tune so, too")
    parser.add_argument("--out", type=Path, default=Path("runs/finetuning"))
    parser.add_argument("--csv", type=Path, help="where the rows go; OUT/results.csv by default")
    given = parser.parse_args()
    variants = {"": []} | {name: shlex.split(rest) for name, _, rest in (text.partition(":") for text in given.variant)}
    rows: list[dict[str, str]] = []
    for seed in given.seeds:
        seeded = ["--seed_everything", str(seed)]
        start = given.out / f"pretrained-seed{seed}"
        options = [*images(given.data), *shlex.split(given.pretrain_options), *seeded]
        before = run("pretrain", given.pretrain, start, *options)
        for epochs in given.epochs:
            for variant, own in variants.items():
                for source in ("pretrained", "scratch"):
                    backbone = start / "backbone"
                    pretrained = source == "pretrained"
                    init = [str(backbone)] if pretrained else ["none", "--model.backbone", str(backbone)]
                    length = ["--data", given.data, "--trainer.max_epochs", str(epochs)]
                    length += ["--trainer.check_val_every_n_epoch", str(epochs)]
                    options = [*length, *shlex.split(given.finetune_options), *own, *seeded]
                    name = "-".join(filter(None, (source, variant, f"{epochs}epochs", f"seed{seed}")))
                    weighed = backbone if pretrained else None
                    place = given.out / name
                    found = run("finetune", given.finetune, place, *init, *options, backbone=weighed)
                    row = {"source": source, "variant": variant, "pretraining_epochs": before["epochs"]}
                    row |= {"epochs": epochs, "seed": seed, "top1": found["top1"], "seconds": round(found["seconds"])}
                    print(json.dumps(row), flush=True)
                    keys = ["source", "variant", "epochs", "seed"]
                    rows = keep(given.csv or given.out / "results.csv", row, keys)
    print(f"| fine-tuning | {' | '.join(f'{epochs} epochs' for epochs in given.epochs)} |")
    print(f"| --- |{' --- |' * len(given.epochs)}")
    for variant in variants:
        for source in ("pretrained", "scratch"):
            cells = []
            for epochs in given.epochs:
                key = {"source": source, "variant": variant, "epochs": str(epochs)}
                found = [float(row["top1"]) for row in rows if key.items() <= row.items()]
                cells.append(f"{mean(found):.1f} ({', '.join(f'{value:.1f}' for value in found)})")
            print(f"| {', '.join(filter(None, (source, variant)))} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
