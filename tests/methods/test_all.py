"""What every method must do: learn on real images, resume exactly, run in two processes, and export what it should."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml

import nepa_plugin
from nepa_plugin import methods
from nepa_plugin.checkpoints import untrained_like
from nepa_plugin.data import evaluation_loaders
from nepa_plugin.evaluation import extract_depth_features, knn_accuracy, logistic_probe
from nepa_plugin.methods.momentum import MomentumMethod
from nepa_plugin.training.cli import main

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "lightly_configs"
#: Method -> points by which it must beat its untrained network on the digits, in kNN or linear probe.
MARGINS = {
    "nepa": 15,
    "simclr": 15,
    "mocov3": 15,
    "simsiam": 15,
    "byol": 15,
    "dino": 15,
    "lejepa": 15,
    "mae": 15,
    "ijepa": 15,
    "aim": 15,
    "ibot": 5,
}
#: Ten epochs do for the others. The losses of DINO and iBOT first fall, then rise while the centre of the teacher's
#: outputs catches up, and fall again; I-JEPA is slow.
EPOCHS = {"dino": "20", "ibot": "20", "ijepa": "20"}
#: Methods with a momentum encoder; of these, DINO, iBOT and I-JEPA export it.
MOMENTUM = {"mocov3", "byol", "dino", "ibot", "ijepa"}
#: Methods whose weights can be sharded.
SHARDED = [name for name in MARGINS if name not in MOMENTUM]


def arguments(name, run_dir, *more):
    quiet = ["--trainer.enable_model_summary", "false", "--trainer.log_every_n_steps", "1"]
    return ["--config", str(CONFIGS / f"{name}_digits.yaml"), "--run_dir", str(run_dir), *quiet, *more]


def curve(run_dir, name="train_loss"):
    with (Path(run_dir) / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def test_every_method_has_its_configs():
    classes = {cls for cls in map(methods.__dict__.get, methods.__all__) if isinstance(cls, type)}
    named = {name: yaml.safe_load((CONFIGS / f"{name}_digits.yaml").read_text()) for name in MARGINS}
    used = {config["model"]["class_path"].rsplit(".", 1)[1] for config in named.values()}
    assert used == {cls.__name__ for cls in classes} - {"Method", "MomentumMethod"}
    for name in MARGINS:
        for data in ("vit_b", "cifar10", "digits"):
            assert (CONFIGS / f"{name}_{data}.yaml").is_file()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns a function from a method's name to its run, made once."""
    runs = {}

    def train(name):
        if name not in runs:
            runs[name] = tmp_path_factory.mktemp(name) / "run"
            main(arguments(name, runs[name], "--trainer.max_epochs", EPOCHS.get(name, "10")), CONFIGS / "base.yaml")
        return runs[name]

    return train


def readouts(model):
    """kNN and linear probe of the mean patch token, in per cent, at the best depth."""
    train, val = (extract_depth_features(model, loader) for loader in evaluation_loaders("digits", model))
    scores = []
    for depth in train.features:
        data = train.features[depth]["mean"], train.labels, val.features[depth]["mean"], val.labels
        scores.append((knn_accuracy(*data), logistic_probe(*data)))
    return tuple(max(column) for column in zip(*scores, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", MARGINS)
def test_learns(name, trained):
    run = trained(name)
    losses = list(curve(run).values())
    assert all(map(math.isfinite, losses))
    assert sum(losses[-10:]) < sum(losses[:10])
    model = nepa_plugin.load_backbone(run / "backbone")
    floor, learned = readouts(untrained_like(model)), readouts(model)
    print(f"{name}: kNN {floor[0]:.1f} -> {learned[0]:.1f}, linear {floor[1]:.1f} -> {learned[1]:.1f}")
    assert max(learned[0] - floor[0], learned[1] - floor[1]) > MARGINS[name]


def method_class(name):
    config = yaml.safe_load((CONFIGS / f"{name}_digits.yaml").read_text())
    return getattr(methods, config["model"]["class_path"].rsplit(".", 1)[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", MARGINS)
def test_exports_what_its_paper_evaluates(name, trained):
    run = trained(name)
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    cls = method_class(name)
    exported = timm.create_model(f"local-dir:{run / 'backbone'}", pretrained=True).state_dict()
    for key, value in exported.items():
        assert torch.equal(value, checkpoint["state_dict"][f"{cls.exported}.{key}"])
    assert (cls.exported == "teacher_backbone") == (name in ("dino", "ibot", "ijepa"))
    assert issubclass(cls, MomentumMethod) == (name in MOMENTUM)
    if name in MOMENTUM:  # it has moved from where it started, and lags behind what is trained
        state = checkpoint["state_dict"]
        key = "blocks.0.attn.qkv.weight"
        assert not torch.equal(state[f"teacher_backbone.{key}"], state[f"backbone.{key}"])
        start = untrained_like(nepa_plugin.load_backbone(run / "backbone")).state_dict()
        assert not torch.equal(start[key], state[f"teacher_backbone.{key}"])


@pytest.mark.slow
@pytest.mark.parametrize("name", MARGINS)
def test_resume_is_exact(name, tmp_path):
    """Six steps, and six steps with a stop after the third, give the same losses and weights."""
    short = ["--trainer.limit_train_batches", "3", "--trainer.max_epochs", "2", "--checkpoint_every_n_steps", "2"]
    tiny = ["--model.backbone_args.depth", "2", "--trainer.check_val_every_n_epoch", "1000"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main(arguments(name, whole, *short, *tiny), CONFIGS / "base.yaml")

    class Stop(Exception):
        pass

    cls = method_class(name)
    original = cls.on_train_batch_start

    def bomb(self, batch, batch_idx):
        if self.trainer.global_step == 3:  # a step after the checkpoint
            raise Stop
        return original(self, batch, batch_idx)

    cls.on_train_batch_start = bomb
    try:
        with pytest.raises(Stop):
            main(arguments(name, parts, *short, *tiny), CONFIGS / "base.yaml")
    finally:
        cls.on_train_batch_start = original
    main(arguments(name, parts, *short, *tiny, "--ckpt_path", "last"), CONFIGS / "base.yaml")
    assert curve(whole) == curve(parts) and len(curve(whole)) == 6
    states = [torch.load(r / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for r in (whole, parts)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Three steps of every method in two gloo processes, half the batch each, and those with sharded weights."""
    out = tmp_path_factory.mktemp("two")
    commands = []
    for name, strategy in [*((name, "auto") for name in MARGINS), *((name, "fsdp") for name in SHARDED)]:
        folder = out / (name if strategy == "auto" else f"{name}-fsdp")
        commands += ["--", *arguments(name, folder, *DISTRIBUTED, "--trainer.devices", "2")]
        commands += ["--trainer.strategy", strategy, "--data.batch_size_per_device", "32"]
    script = Path(__file__).parent / "pretrain_several.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    result = subprocess.run([*torchrun, *commands[1:]], capture_output=True, text=True, timeout=800, env=environment)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return out


DISTRIBUTED = ["--trainer.limit_train_batches", "3", "--trainer.max_epochs", "1", "--model.backbone_args.depth", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MARGINS)
def test_two_processes(name, two_processes):
    losses = curve(two_processes / name)
    assert list(losses) == [0, 1, 2] and all(map(math.isfinite, losses.values()))
    summary = json.loads((two_processes / name / "summary.json").read_text())
    assert summary["devices"] == "2 x cpu" and summary["images_seen"] == 3 * 64
    nepa_plugin.load_backbone(two_processes / name / "backbone")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_sharded_weights_are_trained_alike(name, two_processes):
    whole, sharded = two_processes / name, two_processes / f"{name}-fsdp"
    one, two = curve(whole), curve(sharded)
    assert list(one) == list(two) and max(abs(one[step] - two[step]) for step in one) < 1e-5
    states = [torch.load(r / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for r in (whole, sharded)]
    assert list(states[0]) == list(states[1])
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-5)
    assert json.loads((sharded / "summary.json").read_text())["method"] == method_class(name).__name__


@pytest.mark.parametrize("name", sorted(MOMENTUM))
def test_momentum_encoders_cannot_be_sharded(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments(name, tmp_path / "run", "--trainer.strategy", "fsdp"), CONFIGS / "base.yaml")
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()
    message = f"error: {method_class(name).__name__} cannot be trained with --trainer.strategy fsdp"
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nepa", "dino"])
def test_two_processes_follow_one(name, two_processes, tmp_path):
    """Where neither BatchNorm nor masks depend on the process, the losses are those of one process."""
    main(arguments(name, tmp_path / "one", *DISTRIBUTED), CONFIGS / "base.yaml")
    one, two = curve(tmp_path / "one"), curve(two_processes / name)
    assert list(one) == list(two) and max(abs(one[step] - two[step]) for step in one) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", MARGINS)
def test_cost(name, trained):
    summary = json.loads((trained(name) / "summary.json").read_text())
    views, passes, tokens = (summary[key] for key in ("views", "encoder_passes", "encoder_tokens"))
    single, momentum = name in ("nepa", "mae", "aim", "ijepa"), name in MOMENTUM
    assert (views == 1) == single
    assert passes >= views * (2 if momentum and name in ("mocov3", "byol") else 1)
    assert tokens > 0 and summary["gflops"] > 0
    assert (summary["discarded_parameters"] == 0) == (name in ("nepa",))
