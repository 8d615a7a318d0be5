"""What every method must do in one process: learn on real images, export what it should, and resume exactly."""

import json
import math
from dataclasses import asdict

import pytest
import timm
import torch
from every_method import CONFIGS, METHODS, MOMENTUM, SHORT, Runs, curve, method_class, state, train

import nepa_plugin
from nepa_plugin import methods
from nepa_plugin.checkpoints import untrained_like, weights_hash
from nepa_plugin.data import evaluation_loaders
from nepa_plugin.evaluation import extract_depth_features, knn_accuracy, logistic_probe
from nepa_plugin.methods.cost import training_cost
from nepa_plugin.methods.momentum import MomentumMethod
from nepa_plugin.training.configs import read_config

#: Points by which a method must beat its untrained network on the digits, in kNN or linear probe.
MARGIN = {name: 10 if name == "ibot" else 15 for name in METHODS}
#: Epochs of the network of ``trained`` in which that is so: the losses of DINO and iBOT first fall, then rise while the
#: centre of the teacher's outputs catches up, and fall again.
EPOCHS = {"ibot": 16, "aim": 13, "mae": 9, "ijepa": 11, "beit": 9, "dino": 7, "byol": 7, "lejepa": 7}
EPOCHS |= dict.fromkeys(["nepa", "nepa_plus"], 6) | dict.fromkeys(["mocov3", "simsiam"], 5)
EPOCHS |= dict.fromkeys(["simclr", "igpt", "cpc"], 4)


def test_every_method_has_its_configs():
    classes = {cls for cls in map(methods.__dict__.get, methods.__all__) if isinstance(cls, type)}
    named = {name: read_config(CONFIGS / f"{name}_digits.yaml") for name in METHODS}
    used = {config["model"]["class_path"].rsplit(".", 1)[1] for config in named.values()}
    assert used == {cls.__name__ for cls in classes} - {"Method", "MomentumMethod"}
    for name in METHODS:
        for data in ("vit_b", "cifar10", "digits"):
            assert (CONFIGS / f"{name}_{data}.yaml").is_file()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A method's name -> its run of one layer; or two, of which MAE's kNN gains more and DINO's loss falls sooner."""

    def options(name):
        layers = "2" if name in ("mae", "dino") else "1"
        crops = ["--model.num_local_crops", "0"] if name in ("dino", "ibot") else []
        return ["--trainer.max_epochs", str(EPOCHS[name]), "--model.backbone_args.depth", layers, *crops]

    return Runs(tmp_path_factory.mktemp("trained"), options)


def readouts(model):
    """kNN and linear probe of the mean patch token, in per cent, at the best depth."""
    train, val = (extract_depth_features(model, loader) for loader in evaluation_loaders("digits", model))
    scores = []
    for depth in train.features:
        data = train.features[depth]["mean"], train.labels, val.features[depth]["mean"], val.labels
        scores.append((knn_accuracy(*data), logistic_probe(*data)))
    return tuple(max(column) for column in zip(*scores, strict=True))


FLOORS = {}


def floor_of(model):
    """The same of the untrained network, which several methods share."""
    network = untrained_like(model)
    key = weights_hash(network), getattr(network, "attention", None)
    if key not in FLOORS:
        FLOORS[key] = readouts(network)
    return FLOORS[key]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_learns(name, trained):
    run = trained[name]
    losses = list(curve(run).values())
    assert all(map(math.isfinite, losses))
    assert sum(losses[-10:]) < sum(losses[:10])
    model = nepa_plugin.load_backbone(run / "backbone")
    floor, learned = floor_of(model), readouts(model)
    print(f"{name}: kNN {floor[0]:.1f} -> {learned[0]:.1f}, linear {floor[1]:.1f} -> {learned[1]:.1f}")
    assert max(learned[0] - floor[0], learned[1] - floor[1]) > MARGIN[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_exports_what_its_paper_evaluates(name, trained):
    run = trained[name]
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


# -- six steps of a smaller network -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A method's name -> its run of six steps that nothing interrupts."""
    return Runs(tmp_path_factory.mktemp("whole"), lambda name: SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
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
            train(name, parts, *SHORT)
    train(name, parts, *SHORT, "--ckpt_path", "last")
    assert curve(whole[name]) == curve(parts) and len(curve(parts)) == 6
    states = [state(run) for run in (whole[name], parts)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_summary_holds_the_cost(name, whole):
    """What ``test_costs.py`` holds against a count by hand."""
    summary = json.loads((whole[name] / "summary.json").read_text())
    init = read_config(CONFIGS / f"{name}_digits.yaml")["model"]["init_args"]
    init["backbone_args"] |= {"depth": 2}
    cost = asdict(training_cost(method_class(name)(batch_size_per_device=64, num_classes=10, **init)))
    assert {key: summary[key] for key in cost} == cost
