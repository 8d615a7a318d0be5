"""The moving average of the weights against Lightning's."""

import copy
import json

import pytest
import torch
from pretraining import ROOT, curve, run
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import nepa_plugin.methods
from nepa_plugin.runtime.averaging import FusedEMA, ModelAverage, decay_for, first_weights
from nepa_plugin.training.configs import read_config

DECAY = 0.99
CONFIGS = ROOT / "lightly_configs"


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 10))


def trained(steps):
    """Yield a network after each of some steps on noise; BatchNorm's statistics and counter move too."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield model


def exact(state):
    return {name: value.double() if value.is_floating_point() else value for name, value in state.items()}


def error(state, reference):
    """Summed deviation from a float64 reference."""
    floats = [name for name, value in state.items() if value.is_floating_point()]
    return sum((state[name].double() - reference[name]).abs().sum().item() for name in floats)


def last_place(*tensors):
    """The distance to the next larger number at the largest magnitude among some tensors, per element."""
    largest = torch.stack([tensor.abs() for tensor in tensors]).amax(0)
    return torch.nextafter(largest, torch.tensor(torch.inf)) - largest


def test_the_averages_are_lightnings():
    ours, lightnings = ModelAverage(network(), DECAY), AveragedModel(network(), None, get_ema_avg_fn(DECAY), None, True)
    reference = None
    for model in trained(300):
        ours.update_parameters(model)
        lightnings.update_parameters(model)
        state, value = ours.state_of(model), exact(model.state_dict())
        reference = reference or value
        for name, tensor in value.items():
            if tensor.is_floating_point():
                reference[name] = DECAY * reference[name] + (1 - DECAY) * tensor
    expected = lightnings.module.state_dict()
    assert list(state) == list(expected)
    assert torch.equal(state["1.num_batches_tracked"], expected["1.num_batches_tracked"])
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    # fewer roundings per update than average * d + value * (1 - d)
    assert 0 < error(state, reference) <= error(expected, reference)


def test_one_update_is_lightnings_to_the_last_place():
    steps = trained(3)
    ours, lightnings = ModelAverage(network(), DECAY), AveragedModel(network(), None, get_ema_avg_fn(DECAY), None, True)
    model = next(steps)
    for average in (ours, lightnings):  # the first update copies
        average.update_parameters(model)
    assert all(torch.equal(v, lightnings.module.state_dict()[k]) for k, v in ours.state_of(model).items())
    before = copy.deepcopy(ours.state_of(model))
    model = next(steps)
    for average in (ours, lightnings):
        average.update_parameters(model)
    for name, value in ours.state_of(model).items():
        if value.is_floating_point():
            unit = last_place(before[name], model.state_dict()[name])
            assert ((value - lightnings.module.state_dict()[name]).abs() <= unit).all(), name
    assert ours.num_averaged == int(lightnings.n_averaged) == 2


def test_swap_and_copy():
    steps = trained(3)
    average = ModelAverage(network(), DECAY)
    for model in steps:
        average.update_parameters(model)
    averages, values = copy.deepcopy(average.state_of(model)), copy.deepcopy(model.state_dict())
    average.swap(model)
    assert all(torch.equal(v, averages[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, values[k]) for k, v in average.state_of(model).items())
    average.swap(model)
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    average.copy_to(model)
    assert all(torch.equal(v, averages[k]) for k, v in model.state_dict().items())
    with pytest.raises(KeyError, match=r"3\.bias"):
        average.load_state_of(model, {k: v for k, v in averages.items() if k != "3.bias"})


@pytest.mark.parametrize(("steps", "decay"), [(1, 0), (5, 0), (252, 1 - 5 / 252), (50_000, 0.9999), (10**6, 0.9999)])
def test_the_published_decay_is_lowered_in_a_short_run(steps, decay):
    assert decay_for(steps) == pytest.approx(decay, abs=1e-12)


def test_what_is_left_of_the_first_weights():
    """After the first step the average is its weights; what they are weighted with follows from the updates."""
    value = nn.Linear(1, 1, bias=False)
    average = ModelAverage(value, 0.9)
    for step in range(7):
        nn.init.constant_(value.weight, float(step == 0))
        average.update_parameters(value)
    assert average.averages[0].item() == pytest.approx(first_weights(0.9, 7), rel=1e-6) == pytest.approx(0.9**6)
    assert first_weights(0.0, 7) == 0 and first_weights(decay_for(100), 100) < 0.01


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_averages_fit_runs_of_any_length(path):
    """A config is shortened, to try it or for few images: a number of its own would keep the first weights then."""
    config = read_config(path)
    model = config.get("model", {})
    decay = model.get("init_args", model).get("ema_decay")
    assert not decay or (first_weights(decay, 420) < 0.02 and config["data"]["demo"] == "digits")  # 420 steps


def test_the_decay_that_is_said_is_in_force(tmp_path, caplog):
    """By default that of the run's length, and of the longer one when it goes on; a number of one's own is kept."""
    averages, update = [], ModelAverage.update_parameters
    few = ["--trainer.limit_train_batches", "6", "--model.ema_decay"]

    def record(self, module):
        averages.append(self.decay)
        update(self, module)

    caplog.set_level("INFO", "pytorch_lightning.utilities.rank_zero")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelAverage, "update_parameters", record)
        run("--run_dir", tmp_path / "run", *few, "null", "--trainer.max_epochs", 1)
        run("--run_dir", tmp_path / "run", *few, "null", "--trainer.max_epochs", 2, "--ckpt_path", "last")
        with pytest.warns(
            UserWarning, match=r"decay 0\.9999 spans 10000 steps, this run has 6: 100% of .* Lower ema_decay"
        ):
            run("--run_dir", tmp_path / "own", *few, 0.9999, "--trainer.max_epochs", 1)
    decays = [json.loads((tmp_path / name / "summary.json").read_text())["ema_decay"] for name in ("run", "own")]
    assert decays == [pytest.approx(1 - 5 / 12), 0.9999]
    assert averages == [pytest.approx(1 - 5 / 6)] * 6 + [pytest.approx(1 - 5 / 12)] * 6 + [0.9999] * 6
    for said in ("decay 0.1667. The published 0.9999 spans 10000 steps, this run has 6.", "decay 0.5833. The"):
        assert f"Moving average: {said}" in caplog.text


def test_a_checkpoint_of_lightnings_average_is_resumed(tmp_path, monkeypatch):
    """Runs that were begun with Lightning's own callback go on with ours."""
    options = ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "3", "--model.ema_decay", "0.9"]
    with monkeypatch.context() as patch:
        patch.setattr(nepa_plugin.methods.NEPA, "configure_callbacks", lambda self: [EMAWeightAveraging(decay=0.9)])
        run("--run_dir", tmp_path / "whole", *options)

        class Stop(Exception):
            pass

        def stop(self):
            if self.trainer.current_epoch == 1:
                raise Stop

        patch.setattr(nepa_plugin.methods.NEPA, "on_train_epoch_start", stop)
        with pytest.raises(Stop):
            run("--run_dir", tmp_path / "parts", *options)
    assert FusedEMA(0.9).state_key == EMAWeightAveraging(decay=0.9).state_key
    run("--run_dir", tmp_path / "parts", *options, "--ckpt_path", "last")
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    before, after = (
        torch.load(tmp_path / r / "checkpoints" / "last.ckpt", weights_only=True) for r in ("whole", "parts")
    )
    assert before.keys() == after.keys() and before["callbacks"].keys() == after["callbacks"].keys()
    assert before["averaging_state"] == after["averaging_state"] == {"n_averaged": torch.tensor(6)}
    for name, value in before["current_model_state"].items():
        assert torch.equal(value, after["current_model_state"][name])
    for name, value in before["state_dict"].items():
        torch.testing.assert_close(value, after["state_dict"][name], rtol=1e-6, atol=1e-8)
