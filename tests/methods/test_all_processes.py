"""What every method must do in two processes: train the network that one process trains, with sharded weights too."""

import json
import math

import pytest
import torch
from every_method import BATCH_NORM, METHODS, RANKS, SHORT, Runs, arguments, curve, method_class, state, train
from recording import start

import nepa_plugin
from nepa_plugin.runtime import step_seed

pytestmark = pytest.mark.slow
STATISTICS = "running_mean", "running_var", "num_batches_tracked"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A method's name -> its run of six steps in one process."""
    return Runs(tmp_path_factory.mktemp("whole"), lambda name: [*SHORT, *RANKS])


def assert_same(one, other):
    assert list(one) == list(other)
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The same steps of every method in two gloo processes, half the batch each, and those with sharded weights."""
    out = tmp_path_factory.mktemp("two")
    half = ["--data.batch_size_per_device", "32", "--trainer.strategy"]
    runs = [arguments(name, out / name, *SHORT, *half, "auto", *RANKS) for name in METHODS]
    runs += [arguments(name, out / f"{name}-fsdp", *SHORT, *half, "fsdp") for name in METHODS]
    printed = start(2, *runs).stdout.splitlines()
    lines = [line for line in printed if line.startswith("epoch ")]
    assert len(lines) == 2 * len(runs)
    for number, name in enumerate(METHODS):
        (out / name / "lines.txt").write_text("\n".join(lines[2 * number : 2 * number + 2]))
    return out


def ranks(run_dir, number=2):
    return [torch.load(run_dir / f"rank-{rank}.pt", weights_only=True) for rank in range(number)]


@pytest.mark.parametrize("name", METHODS)
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
    assert own == {key for key in first["state"] if key.endswith(STATISTICS[:2])}
    assert bool(own) == (name in BATCH_NORM)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["devices"] == "2 x cpu" and summary["images_seen"] == 6 * 64
    exported = nepa_plugin.load_backbone(run / "backbone").state_dict()
    assert all(torch.equal(v, state(run)[f"{method_class(name).exported}.{k}"]) for k, v in exported.items())


@pytest.mark.parametrize("name", ["nepa", "dino"])
def test_two_processes_follow_one(name, whole, two_processes):
    """Where neither BatchNorm nor masks depend on the process, losses and weights are those of one process."""
    one, two = curve(whole[name]), curve(two_processes / name)
    # DINO divides float32 logits by 0.02
    assert two == pytest.approx(one, rel=0, abs=1e-5 if name == "nepa" else 5e-5)
    assert_same(state(whole[name]), state(two_processes / name))


@pytest.mark.parametrize("name", ["nepa", "simsiam", "byol", "mae", "ijepa", "aim", "beit", "igpt", "cpc"])
def test_two_processes_are_two_halves_of_a_batch(name, two_processes, tmp_path, monkeypatch):
    """Where images are not compared over the batch: one process with the halves one after the other does the same."""
    # each half draws the masks that its process draws
    place = staticmethod(lambda trainer: divmod(step_seed.trained_batches(trainer), 2))
    monkeypatch.setattr(step_seed.StepSeed, "place", place)
    halves = ["--data.batch_size_per_device", "32", "--trainer.limit_train_batches", "6"]
    train(name, tmp_path / "one", *SHORT, *RANKS, *halves)
    runs = tmp_path / "one", two_processes / name
    (one,) = ranks(runs[0], 1)
    for rank, other in enumerate(ranks(runs[1])):
        assert other["losses"] == pytest.approx(one["losses"][rank::2], rel=0, abs=1e-5)
    # BatchNorm's statistics are rank 0's there, and of both halves here
    one, two = ({k: v for k, v in state(run).items() if not k.endswith(STATISTICS)} for run in runs)
    assert len(one) > len(state(runs[0])) / 2
    assert_same(one, two)


@pytest.mark.parametrize(("name", "bound"), [("simclr", 0.1), ("mocov3", 0.1), ("lejepa", 0.06)])
def test_images_are_compared_over_both_processes(name, bound, whole, two_processes):
    """Only BatchNorm sees half the batch: the losses stay near those of one process.

    They were within 0.018, 0.039 and 0.026; with only its own images SimCLR's would be 0.69 lower (the logarithm of
    half as many others) and MoCo v3's 2 x 0.4 x 0.69.
    """
    one, two = curve(whole[name]), curve(two_processes / name)
    assert list(one) == list(two)
    assert max(abs(one[step] - two[step]) for step in one) < bound


@pytest.mark.parametrize("name", METHODS)
def test_sharded_weights_are_trained_alike(name, two_processes):
    one, two = curve(two_processes / name), curve(two_processes / f"{name}-fsdp")
    assert list(one) == list(two) and max(abs(one[step] - two[step]) for step in one) < 1e-5
    assert_same(state(two_processes / name), state(two_processes / f"{name}-fsdp"))
    summary = json.loads((two_processes / f"{name}-fsdp" / "summary.json").read_text())
    assert summary["method"] == method_class(name).__name__
