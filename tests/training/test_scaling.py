"""Several processes train what one process trains, send no more than they must, and stop and go on anywhere."""

import json
import math
import shutil

import pytest
import torch
from pretraining import curve
from recording import arguments, start

import nepa_plugin
from nepa_plugin.training.cli import base_config, main

pytestmark = pytest.mark.slow
LOGGED = ("--trainer.log_every_n_steps", "1")
COUNTED = {"class_path": "nepa_plugin.speed.communication.CommunicationCount", "init_args": {"step": 2}}
WIDE = [
    *("--model.backbone_args.embed_dim", "128", "--model.backbone_args.depth", "3"),
    *("--model.backbone_args.num_heads", "4"),
]


def callbacks(*counted, **recorder):
    return "--trainer.callbacks", json.dumps([{"class_path": "recording.Recorder", "init_args": recorder}, *counted])


def short(run_dir, batch_size, *more, accumulate=1):
    """Four optimizer steps, none of them logged."""
    limit = "--trainer.limit_train_batches", 4 * accumulate, "--trainer.max_epochs", 1
    size = "--data.batch_size_per_device", batch_size, "--trainer.log_every_n_steps", 50
    return arguments(run_dir, *limit, *size, *more, *callbacks(COUNTED))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Four steps, and 20 logged steps, in one process."""
    folder = tmp_path_factory.mktemp("single")
    main(short(folder / "ddp", 128), base_config())
    main(short(folder / "accumulated", 64, accumulate=2), base_config())
    main(arguments(folder / "long", *LOGGED, *callbacks()), base_config())
    return folder


@pytest.fixture(scope="module", params=[2, 4])
def several(request, tmp_path_factory):
    """The same in 2 and in 4 processes, by every strategy; one of the runs is stopped in the middle by SIGTERM."""
    n, folder = request.param, tmp_path_factory.mktemp("several")
    fsdp = ("--trainer.strategy", "fsdp")
    runs = [
        short(folder / "ddp", 128 // n),
        short(folder / "accumulated", 64 // n, accumulate=2),
        short(folder / "fsdp", 128 // n, *fsdp),
        short(folder / "fsdp-checkpointed", 128 // n, *fsdp, "--model.grad_checkpointing", "true"),
        short(folder / "wide", 128 // n, *WIDE),
        arguments(folder / "long", "--data.batch_size_per_device", 128 // n, *LOGGED, *fsdp, *callbacks()),
    ]
    stopped = "--data.batch_size_per_device", 128 // n, *LOGGED, *callbacks(terminate_at=13)
    runs.append(arguments(folder / "stopped", *stopped, *fsdp))
    runs.append(arguments(folder / "stopped-ddp", *stopped))
    result = start(n, *runs)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return n, folder


def records(run_dir, n):
    return [torch.load(run_dir / f"record-{rank}.pt", weights_only=True) for rank in range(n)]


def checkpoint(run_dir):
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same_state(run_dir, reference, atol):
    """Averaged and current weights, and AdamW's state, under the same names, in a file like any other."""
    one, other = checkpoint(reference), checkpoint(run_dir)
    assert one.keys() == other.keys()
    for key in ("state_dict", "current_model_state"):
        assert list(one[key]) == list(other[key])
        for name, value in one[key].items():
            torch.testing.assert_close(other[key][name], value, rtol=0, atol=atol)
    before, after = one["optimizer_states"][0], other["optimizer_states"][0]
    assert [g["params"] for g in before["param_groups"]] == [g["params"] for g in after["param_groups"]]
    assert [g["weight_decay"] for g in before["param_groups"]] == [g["weight_decay"] for g in after["param_groups"]]
    for i, values in before["state"].items():
        for name, value in values.items():
            torch.testing.assert_close(after["state"][i][name], value, rtol=0, atol=atol)


@pytest.mark.parametrize("run", ["ddp", "accumulated", "fsdp", "fsdp-checkpointed"])
def test_losses_and_gradients_are_those_of_one_process(run, several, single):
    n, folder = several
    reference = single / ("accumulated" if run == "accumulated" else "ddp")
    (one,) = records(reference, 1)
    ranks = records(folder / run, n)
    losses = torch.tensor([rank["losses"] for rank in ranks]).mean(0)
    assert len(losses) == (8 if run == "accumulated" else 4)
    torch.testing.assert_close(losses, torch.tensor(one["losses"]), rtol=0, atol=2e-6)
    assert len(one["gradients"]) == 4
    for step, gradients in enumerate(one["gradients"]):
        for name, gradient in gradients.items():
            assert gradient.abs().max() > 0, name
            for rank in ranks:
                other = rank["gradients"][step][name]
                assert torch.equal(other, ranks[0]["gradients"][step][name])
                scale = gradient.abs().max().item()
                torch.testing.assert_close(other, gradient, rtol=0, atol=1e-4 * scale + 1e-8)
    assert_same_state(folder / run, reference, 2e-6)


def trainable_shapes(run_dir):
    return [values["exp_avg"].shape for values in checkpoint(run_dir)["optimizer_states"][0]["state"].values()]


@pytest.mark.parametrize(("run", "batches"), [("ddp", 1), ("accumulated", 2), ("wide", 1)])
def test_ddp_sends_every_gradient_once_per_step_and_nothing_else(run, batches, several):
    _, folder = several
    counts = json.loads((folder / run / "communication.json").read_text())
    gradients = counts.pop("all_reduce float")
    assert gradients["bytes"] == 4 * sum(map(math.prod, trainable_shapes(folder / run)))
    assert gradients["calls"] == 1 if run != "wide" else gradients["calls"] > 1  # buckets: 1 MiB, then of 25 MiB
    assert counts == {"all_reduce unsigned char": {"calls": batches, "bytes": batches}}  # has any process got SIGTERM?


@pytest.mark.parametrize("run", ["fsdp", "fsdp-checkpointed"])
def test_fsdp_gathers_every_weight_twice_and_reduces_its_gradient_once(run, several):
    n, folder = several
    counts = json.loads((folder / run / "communication.json").read_text())
    shapes = trainable_shapes(folder / run)
    padded = 4 * n * sum(math.ceil(s[0] / n) * math.prod(s[1:]) for s in shapes)  # to as many rows on every rank
    norms = 4 * (len(shapes) - 2)  # of each tensor but the probe's two, for clipping
    # two blocks of two parts, and the rest; gloo has no reduce-scatter and reduces all of it
    assert counts.pop("all_gather float") == {"calls": 10, "bytes": 2 * padded // n}
    assert counts.pop("all_reduce float") == {"calls": 6, "bytes": padded + norms}
    assert counts == {"all_reduce unsigned char": {"calls": 1, "bytes": 1}}


def test_fsdp_divides_weights_optimizer_and_average(several, single):
    n, folder = several
    (whole,) = records(single / "ddp", 1)
    held = [rank["held_bytes"] for rank in records(folder / "fsdp", n)]
    buffers = whole["held_bytes"] - 4 * 4 * sum(map(math.prod, trainable_shapes(single / "ddp")))
    assert sum(held) == whole["held_bytes"] + (n - 1) * buffers
    assert max(held) - buffers < 1.05 * (whole["held_bytes"] - buffers) / n
    assert [rank["held_bytes"] for rank in records(folder / "ddp", n)] == n * [whole["held_bytes"]]


def resumed(source, target, n, strategy, single):
    """Go on with a stopped run in ``n`` processes, and compare with the run that was never stopped."""
    shutil.copytree(source, target)
    more = "--data.batch_size_per_device", 128 // n, *LOGGED, "--ckpt_path", "auto", "--trainer.strategy", strategy
    if n == 1:
        main(arguments(target, *more), base_config())
    else:
        result = start(n, arguments(target, *more))
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    whole, parts = curve(single / "long"), curve(target)
    assert list(whole) == sorted(parts) == list(range(20))
    assert max(abs(whole[s] - parts[s]) for s in whole) <= 1e-5
    assert_same_state(target, single / "long", 1e-5)
    return parts


@pytest.mark.parametrize("run", ["stopped", "stopped-ddp"])
def test_sigterm_on_one_process_stops_all_after_the_same_step(run, several):
    _, folder = several
    # the signal came in the 14th step, was told before the 15th, and read before the 16th
    assert checkpoint(folder / run)["global_step"] == 15
    assert not (folder / run / "backbone").exists()
    nepa_plugin.load_backbone(folder / run / "checkpoints" / "last.ckpt")


def test_a_sharded_run_goes_on_in_as_many_processes_exactly(several, single, tmp_path):
    n, folder = several
    parts = resumed(folder / "stopped", tmp_path / "r", n, "fsdp", single)
    assert parts == curve(folder / "long")
    one, other = checkpoint(folder / "long"), checkpoint(tmp_path / "r")
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, other[key][name]) for name, value in one[key].items())


@pytest.mark.parametrize("run", ["stopped", "stopped-ddp"])
def test_a_run_goes_on_in_another_number_of_processes(run, several, single, tmp_path):
    """Sharded in two: sharded in four; in four: sharded in two; unsharded in two: one; in four: sharded in two."""
    n, folder = several
    alone = n == 2 and run == "stopped-ddp"
    resumed(folder / run, tmp_path / "r", 1 if alone else 6 - n, "auto" if alone else "fsdp", single)


def test_a_sharded_run_goes_on_unsharded(several, single, tmp_path):
    """In one process, and by DDP in two."""
    n, folder = several
    resumed(folder / "stopped", tmp_path / "r", n // 2, "auto", single)


def test_a_killed_process_is_started_again_from_the_last_step(single, tmp_path):
    """torchrun --max-restarts: one of two processes dies, both come back, and the losses are those of one process."""
    run_dir = tmp_path / "r"
    more = "--data.batch_size_per_device", 64, *LOGGED, "--ckpt_path", "auto", "--checkpoint_every_n_steps", 3
    result = start(2, arguments(run_dir, *more, *callbacks(kill_at=14)), restarts=1)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "(exitcode: -9)" in result.stderr and (run_dir / "config-2.yaml").is_file()
    whole, parts = curve(single / "long"), curve(run_dir)
    assert list(whole) == sorted(parts)
    assert max(abs(whole[s] - parts[s]) for s in whole) <= 1e-5
    assert_same_state(run_dir, single / "long", 1e-5)
