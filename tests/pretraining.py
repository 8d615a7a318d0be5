"""The pretraining command on the digits, small, as the tests run it."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nepa_plugin.training.cli import main

ROOT = Path(__file__).parents[1]
BASE = ROOT / "lightly_configs" / "base.yaml"
DIGITS = ROOT / "lightly_configs" / "nepa_demo.yaml"
FAST = [
    *("--model.backbone_args.embed_dim", "32", "--model.backbone_args.depth", "2"),
    *("--model.backbone_args.num_heads", "2", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1"),
    *("--trainer.check_val_every_n_epoch", "1", "--trainer.enable_model_summary", "false"),
]


def run(*args, code=None):
    arguments = ["--config", str(DIGITS), *FAST, *map(str, args)]
    if code is None:
        return main(arguments, BASE)
    with pytest.raises(SystemExit) as error:
        main(arguments, BASE)
    assert error.value.code == code
    return None


def finished(arguments, seconds=300, **environment):
    """Run a command to its end; if it hangs, fail with what every thread of it was doing."""
    variables = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONFAULTHANDLER="1", **environment)
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdout=pipe, stderr=pipe, text=True, env=variables) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)
            out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out[-1000:] + err[-8000:]


def curve(run_dir, name="train_loss"):
    with (Path(run_dir) / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def command(run_dir, *args):
    return [
        sys.executable,
        str(ROOT / "tools" / "pretrain.py"),
        "--config",
        str(DIGITS),
        *FAST,
        "--run_dir",
        str(run_dir),
        *args,
    ]
