"""What the tests of every method share: the methods, their options for a run of six steps, and what a run has left."""

import csv
import json
from pathlib import Path

import torch

from nepa_plugin import methods
from nepa_plugin.training.cli import main
from nepa_plugin.training.configs import read_config

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "lightly_configs"
METHODS = [
    "nepa",
    "nepa_plus",
    "simclr",
    "mocov3",
    "simsiam",
    "byol",
    "dino",
    "lejepa",
    "mae",
    "ijepa",
    "aim",
    "ibot",
    "beit",
    "igpt",
    "cpc",
]
#: Methods with a momentum encoder; of these, DINO, iBOT and I-JEPA export it.
MOMENTUM = {"mocov3", "byol", "dino", "ibot", "ijepa"}
#: Methods with BatchNorm in a head.
BATCH_NORM = {"simclr", "mocov3", "simsiam", "byol", "lejepa"}
#: Six steps of a smaller network.
SHORT = [
    *("--trainer.limit_train_batches", "3", "--trainer.max_epochs", "2", "--checkpoint_every_n_steps", "2"),
    *("--model.backbone_args.depth", "2", "--trainer.check_val_every_n_epoch", "1000"),
]
RANKS = ["--trainer.callbacks", json.dumps([{"class_path": "recording.Ranks"}])]


def arguments(name, run_dir, *more):
    """Options of a method's run on the digits that logs every step."""
    quiet = ["--trainer.enable_model_summary", "false", "--trainer.log_every_n_steps", "1"]
    return ["--config", str(CONFIGS / f"{name}_digits.yaml"), "--run_dir", str(run_dir), *quiet, *more]


def train(name, run_dir, *more):
    """Train in this process, and return the run folder."""
    main(arguments(name, run_dir, *more), CONFIGS / "base.yaml")
    return run_dir


def method_class(name):
    config = read_config(CONFIGS / f"{name}_digits.yaml")
    return getattr(methods, config["model"]["class_path"].rsplit(".", 1)[1])


def curve(run_dir, name="train_loss"):
    """Step -> value of a column of metrics.csv."""
    with (Path(run_dir) / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def state(run_dir):
    return torch.load(Path(run_dir) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


class Runs(dict):
    """A method's name -> its run with the options for that name, which is made once, when it is first asked for."""

    def __init__(self, folder, options):
        self.folder, self.options = folder, options

    def __missing__(self, name):
        self[name] = train(name, self.folder / name, *self.options(name))
        return self[name]
