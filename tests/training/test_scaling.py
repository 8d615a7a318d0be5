"""Several processes train what one process trains, send no more than they must, and stop and go on anywhere."""

import json
import math
import shutil

import pytest
import torch
from pretraining import curve
from recording import arguments, start

import nepa_plugin
from nepa_plugin.data.digits import digits_folder
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
def few_images(tmp_path_factory):
    """64 digits to train on; 33 to validate: two processes have 17 and 16 of them, two batches of 16 and one."""
    folder = tmp_path_factory.mktemp("few")
    for part, number in (("train", 64), ("val", 33)):
        files = sorted((digits_folder() / part).glob("*/*.png"), key=lambda file: file.name)
        for file in files[:number]:
            target = folder / part / file.parent.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    return folder


def validated(run_dir, images, batch_size, *more):
    """Two steps of 32 images, and a validation."""
    folders = "--data.train_dir", images / "train", "--data.val_dir", images / "val", "--data.demo", "null"
    once = "--trainer.max_epochs", 1, "--trainer.check_val_every_n_epoch", 1, *LOGGED
    size = "--data.batch_size_per_device", batch_size, "--global_batch_size", 32
    return arguments(run_dir, *folders, *once, *size, *more)


@pytest.fixture(scope="module")
def single(few_images, tmp_path_factory):
    """Four steps, 20 logged steps, and a validation, in one process."""
    folder = tmp_path_factory.mktemp("single")
    main(short(folder / "ddp", 128), base_config())
    main(short(folder / "accumulated", 64, accumulate=2), base_config())
    main(arguments(folder / "long", *LOGGED, *callbacks()), base_config())
    main(validated(folder / "validated", few_images, 32), base_config())
    return folder


FSDP = ("--trainer.strategy", "fsdp")


def runs(n, folder):
    """The same in n processes, by both strategies; two of the runs are stopped in the middle by SIGTERM."""
    stopped = "--data.batch_size_per_device", 128 // n, *LOGGED, *callbacks(terminate_at=13)
    return [
        short(folder / "ddp", 128 // n),
        short(folder / "fsdp", 128 // n, *FSDP),
        arguments(folder / "long", "--data.batch_size_per_device", 128 // n, *LOGGED, *FSDP, *callbacks()),
        arguments(folder / "stopped", *stopped, *FSDP),
        arguments(folder / "stopped-ddp", *stopped),
    ]


def resumed(run_dir, n, strategy="fsdp"):
    """Going on with a stopped run in n processes."""
    size = "--data.batch_size_per_device", 128 // n
    return arguments(run_dir, *size, *LOGGED, "--ckpt_path", "auto", "--trainer.strategy", strategy)


@pytest.fixture(scope="module")
def two(few_images, tmp_path_factory):
    """All runs in two processes, and a copy of the sharded one that was stopped goes on there."""
    folder = tmp_path_factory.mktemp("two")
    more = [
        short(folder / "accumulated", 32, accumulate=2),
        short(folder / "fsdp-checkpointed", 64, *FSDP, "--model.grad_checkpointing", "true"),
        short(folder / "wide", 64, *WIDE),
        validated(folder / "validated", few_images, 16, *FSDP),
        validated(folder / "validated-ddp", few_images, 16),
    ]
    copy = ["copy", str(folder / "stopped"), str(folder / "resumed")]
    start(2, *more, *runs(2, folder), copy, resumed(folder / "resumed", 2))
    return folder


@pytest.fixture(scope="module")
def four(two, tmp_path_factory):
    """All runs in four processes, and copies of the sharded ones that were stopped here and in two go on there."""
    folder = tmp_path_factory.mktemp("four")
    shutil.copytree(two / "stopped", folder / "from-2")
    copy = ["copy", str(folder / "stopped"), str(folder / "resumed")]
    start(4, *runs(4, folder), copy, resumed(folder / "resumed", 4), resumed(folder / "from-2", 4))
    return folder


@pytest.fixture(scope="module")
def from_four(four, tmp_path_factory):
    """What was stopped in four processes goes on in two: sharded after both strategies, and by DDP."""
    folder = tmp_path_factory.mktemp("from-four")
    for target, source in (("stopped", "stopped"), ("stopped-ddp", "stopped-ddp"), ("unsharded", "stopped")):
        shutil.copytree(four / source, folder / target)
    sharded = [resumed(folder / run, 2) for run in ("stopped", "stopped-ddp")]
    start(2, *sharded, resumed(folder / "unsharded", 2, "ddp"))
    return folder


@pytest.fixture(params=[2, 4])
def several(request):
    """The number of processes, and the runs in them."""
    return request.param, request.getfixturevalue("two" if request.param == 2 else "four")


def both(*in_both, two=()):
    """Parameters (run, several): some runs are there in two and in four processes, the others in two alone."""
    cases = [(run, n) for n in (2, 4) for run in (in_both if n == 4 else (*in_both, *two))]
    return pytest.mark.parametrize(("run", "several"), cases, indirect=["several"], ids=[f"{r}-{n}" for r, n in cases])


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


@both("ddp", "fsdp", two=("accumulated", "fsdp-checkpointed"))
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


@both("ddp", two=("accumulated", "wide"))
def test_ddp_sends_every_gradient_once_per_step_and_nothing_else(run, several):
    _, folder = several
    batches = 2 if run == "accumulated" else 1
    counts = json.loads((folder / run / "communication.json").read_text())
    gradients = counts.pop("all_reduce float")
    assert gradients["bytes"] == 4 * sum(map(math.prod, trainable_shapes(folder / run)))
    assert gradients["calls"] == 1 if run != "wide" else gradients["calls"] > 1  # buckets: 1 MiB, then of 25 MiB
    assert counts == {"all_reduce unsigned char": {"calls": batches, "bytes": batches}}  # has any process got SIGTERM?


@both("fsdp", two=("fsdp-checkpointed",))
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


@pytest.mark.parametrize("run", ["validated", "validated-ddp"])
def test_processes_with_other_numbers_of_images_validate_together(run, two, single):
    """Sharded, a batch more on one process would wait for ever; the image that fills the other's up does not count."""
    for name, tolerance in (("val_online_cls_top1", 1e-6), ("val_online_cls_loss", 1e-5)):
        (one,), (other,) = (curve(folder, name).values() for folder in (single / "validated", two / run))
        assert other == pytest.approx(one, abs=tolerance)
        assert name.endswith("loss") or one * 33 == pytest.approx(round(one * 33), abs=1e-4)


def assert_never_stopped(target, single):
    """The losses and the end of a run that was resumed are those of the run that nothing stopped."""
    whole, parts = curve(single / "long"), curve(target)
    assert list(whole) == sorted(parts) == list(range(20))
    assert max(abs(whole[s] - parts[s]) for s in whole) <= 1e-5
    assert_same_state(target, single / "long", 1e-5)


@pytest.mark.parametrize("run", ["stopped", "stopped-ddp"])
def test_sigterm_on_one_process_stops_all_after_the_same_step(run, several):
    _, folder = several
    # the signal came in the 14th step, was told before the 15th, and read before the 16th
    assert checkpoint(folder / run)["global_step"] == 15
    assert not (folder / run / "backbone").exists()
    nepa_plugin.load_backbone(folder / run / "checkpoints" / "last.ckpt")


def test_a_sharded_run_goes_on_in_as_many_processes_exactly(several, single):
    _, folder = several
    assert_never_stopped(folder / "resumed", single)
    assert curve(folder / "resumed") == curve(folder / "long")
    one, other = checkpoint(folder / "long"), checkpoint(folder / "resumed")
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, other[key][name]) for name, value in one[key].items())


@pytest.mark.parametrize(
    ("fixture", "run"),
    [("four", "from-2"), ("from_four", "stopped"), ("from_four", "stopped-ddp"), ("from_four", "unsharded")],
    ids=["sharded-2-to-4", "sharded-4-to-2", "ddp-4-to-sharded-2", "sharded-4-to-ddp-2"],
)
def test_a_run_goes_on_in_another_number_of_processes(fixture, run, single, request):
    assert_never_stopped(request.getfixturevalue(fixture) / run, single)


@pytest.mark.parametrize("run", ["stopped", "stopped-ddp"])
def test_a_run_of_two_processes_goes_on_in_one(run, two, single, tmp_path):
    shutil.copytree(two / run, tmp_path / "r")
    main(resumed(tmp_path / "r", 1, "auto"), base_config())
    assert_never_stopped(tmp_path / "r", single)


def test_a_killed_process_is_started_again_from_the_last_step(single, tmp_path):
    """torchrun --max-restarts: one of two processes dies, both come back, and the losses are those of one process."""
    run_dir = tmp_path / "r"
    more = "--data.batch_size_per_device", 64, *LOGGED, "--ckpt_path", "auto", "--checkpoint_every_n_steps", 3
    start(2, arguments(run_dir, *more, *callbacks(kill_at=14)), restarts=1)
    assert (run_dir / "killed").is_file() and (run_dir / "config-2.yaml").is_file()
    assert_never_stopped(run_dir, single)
