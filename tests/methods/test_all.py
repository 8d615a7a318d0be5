"""What every method must do: learn on real images, resume exactly, run in two processes, and export what it should."""

import csv
import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import timm
import torch
import yaml
from recording import start

import nepa_plugin
from nepa_plugin import methods
from nepa_plugin.checkpoints import untrained_like
from nepa_plugin.data import evaluation_loaders, samples
from nepa_plugin.evaluation import extract_depth_features, knn_accuracy, logistic_probe
from nepa_plugin.methods.cost import training_cost
from nepa_plugin.methods.momentum import MomentumMethod
from nepa_plugin.training import callbacks
from nepa_plugin.training.cli import main
from nepa_plugin.training.configs import read_config

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
#: Methods with BatchNorm in a head.
BATCH_NORM = {"simclr", "mocov3", "simsiam", "byol", "lejepa"}
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


# -- six steps of a smaller network: whole, resumed, in two processes --------------------------------------------------

SHORT = [
    *("--trainer.limit_train_batches", "3", "--trainer.max_epochs", "2", "--checkpoint_every_n_steps", "2"),
    *("--model.backbone_args.depth", "2", "--trainer.check_val_every_n_epoch", "1000"),
]
RANKS = ["--trainer.callbacks", json.dumps([{"class_path": "recording.Ranks"}])]


def assert_same(one, other):
    assert list(one) == list(other)
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def state(run_dir):
    return torch.load(Path(run_dir) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Returns a function from a method's name to its run of six steps that nothing interrupts, made once."""
    runs = {}

    def train(name):
        if name not in runs:
            runs[name] = tmp_path_factory.mktemp(name) / "whole"
            main(arguments(name, runs[name], *SHORT, *RANKS), CONFIGS / "base.yaml")
        return runs[name]

    return train


@pytest.mark.slow
@pytest.mark.parametrize("name", MARGINS)
def test_resume_is_exact(name, whole, tmp_path, monkeypatch):
    """Six steps, and six steps with a stop after the third, give the same losses and weights."""

    class Stop(Exception):
        pass

    cls = method_class(name)
    original = cls.on_train_batch_start

    def bomb(self, batch, batch_idx):
        if self.trainer.global_step == 3:  # a step after the checkpoint
            raise Stop
        return original(self, batch, batch_idx)

    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(cls, "on_train_batch_start", bomb)
        with pytest.raises(Stop):
            main(arguments(name, parts, *SHORT), CONFIGS / "base.yaml")
    main(arguments(name, parts, *SHORT, "--ckpt_path", "last"), CONFIGS / "base.yaml")
    assert curve(whole(name)) == curve(parts) and len(curve(parts)) == 6
    states = [state(run) for run in (whole(name), parts)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The same steps of every method in two gloo processes, half the batch each, and those with sharded weights."""
    out = tmp_path_factory.mktemp("two")
    half = ["--data.batch_size_per_device", "32", "--trainer.strategy"]
    runs = [arguments(name, out / name, *SHORT, *half, "auto", *RANKS) for name in MARGINS]
    runs += [arguments(name, out / f"{name}-fsdp", *SHORT, *half, "fsdp") for name in SHARDED]
    printed = start(2, *runs).stdout.splitlines()
    lines = [line for line in printed if line.startswith("epoch ")]
    assert len(lines) == 2 * len(runs)
    for number, name in enumerate(MARGINS):
        (out / name / "lines.txt").write_text("\n".join(lines[2 * number : 2 * number + 2]))
    return out


def ranks(run_dir, number=2):
    return [torch.load(run_dir / f"rank-{rank}.pt", weights_only=True) for rank in range(number)]


@pytest.mark.slow
@pytest.mark.parametrize("name", MARGINS)
def test_two_processes_train_one_network(name, two_processes):
    """Weights, momentum encoders and centers are the same; only BatchNorm's statistics are each process's own."""
    run = two_processes / name
    losses = curve(run)
    first, second = ranks(run)
    means = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert list(losses) == list(range(6)) and all(map(math.isfinite, means))
    assert all(a != b for a, b in zip(first["losses"], second["losses"], strict=True))  # other images
    for epoch, line in enumerate((run / "lines.txt").read_text().splitlines()):
        mean = sum(losses[3 * epoch + step] for step in range(3)) / 3
        assert line.startswith(f"epoch {epoch + 1}/2  step {3 * epoch + 3}  loss {mean:.4g}  images/s ")
    own = {key for key, value in first["state"].items() if not torch.equal(value, second["state"][key])}
    assert own == {key for key in first["state"] if key.endswith(("running_mean", "running_var"))}
    assert bool(own) == (name in BATCH_NORM)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["devices"] == "2 x cpu" and summary["images_seen"] == 6 * 64
    exported = nepa_plugin.load_backbone(run / "backbone").state_dict()
    assert all(torch.equal(v, state(run)[f"{method_class(name).exported}.{k}"]) for k, v in exported.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nepa", "dino"])
def test_two_processes_follow_one(name, whole, two_processes):
    """Where neither BatchNorm nor masks depend on the process, losses and weights are those of one process."""
    one, two = curve(whole(name)), curve(two_processes / name)
    # DINO divides float32 logits by 0.02
    assert two == pytest.approx(one, rel=0, abs=1e-5 if name == "nepa" else 5e-5)
    assert_same(state(whole(name)), state(two_processes / name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nepa", "simsiam", "byol", "mae", "ijepa", "aim"])
def test_two_processes_are_two_halves_of_a_batch(name, two_processes, tmp_path, monkeypatch):
    """Where images are not compared over the batch: one process with the halves one after the other does the same."""
    # a seed per step and not per half: every process draws the same masks for its half
    monkeypatch.setattr(callbacks, "trained_batches", lambda trainer: samples.trained_batches(trainer) // 2)
    halves = ["--data.batch_size_per_device", "32", "--trainer.limit_train_batches", "6"]
    main(arguments(name, tmp_path / "one", *SHORT, *RANKS, *halves), CONFIGS / "base.yaml")
    (one,) = ranks(tmp_path / "one", 1)
    for rank, other in enumerate(ranks(two_processes / name)):
        assert other["losses"] == pytest.approx(one["losses"][rank::2], rel=0, abs=1e-5)
    print(
        name,
        {
            k: (v - state(two_processes / name)[k]).abs().max().item()
            for k, v in state(tmp_path / "one").items()
            if not torch.allclose(v, state(two_processes / name)[k], rtol=1e-4, atol=1e-5)
        },
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bound"), [("simclr", 0.1), ("mocov3", 0.1), ("lejepa", 0.06)])
def test_images_are_compared_over_both_processes(name, bound, whole, two_processes):
    """Only BatchNorm sees half the batch: the losses stay near those of one process.

    They were within 0.018, 0.039 and 0.026; with only its own images SimCLR's would be 0.69 lower (the logarithm of
    half as many others) and MoCo v3's 2 x 0.4 x 0.69.
    """
    one, two = curve(whole(name)), curve(two_processes / name)
    assert list(one) == list(two)
    assert max(abs(one[step] - two[step]) for step in one) < bound


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_sharded_weights_are_trained_alike(name, two_processes):
    one, two = curve(two_processes / name), curve(two_processes / f"{name}-fsdp")
    assert list(one) == list(two) and max(abs(one[step] - two[step]) for step in one) < 1e-5
    assert_same(state(two_processes / name), state(two_processes / f"{name}-fsdp"))
    summary = json.loads((two_processes / f"{name}-fsdp" / "summary.json").read_text())
    assert summary["method"] == method_class(name).__name__


@pytest.mark.parametrize("name", sorted(MOMENTUM))
def test_momentum_encoders_cannot_be_sharded(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments(name, tmp_path / "run", "--trainer.strategy", "fsdp"), CONFIGS / "base.yaml")
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()
    message = f"error: {method_class(name).__name__} cannot be trained with --trainer.strategy fsdp"
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", MARGINS)
def test_the_summary_holds_the_cost(name, whole):
    """What ``test_costs.py`` holds against a count by hand."""
    summary = json.loads((whole(name) / "summary.json").read_text())
    init = read_config(CONFIGS / f"{name}_digits.yaml")["model"]["init_args"]
    init["backbone_args"] |= {"depth": 2}
    cost = asdict(training_cost(method_class(name)(batch_size_per_device=64, num_classes=10, **init)))
    assert {key: summary[key] for key in cost} == cost
