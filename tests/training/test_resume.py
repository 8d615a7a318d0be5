"""Going on with other options: every step's learning rate is that of the run as it is asked for now."""

import math
import warnings

import pytest
import torch
from pretraining import curve, run


def scheduled(step, steps, warmup, peak, end=0.0):
    """The learning rate of optimizer step ``step``: linear warm-up, then a cosine that ends in the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    rest = steps - warmup
    progress = 1.0 if rest == 1 else (step - warmup) / (rest - 1)
    return end + (peak - end) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A run of two epochs, 20 steps, with a warm-up of two."""
    folder = tmp_path_factory.mktemp("short") / "run"
    run("--run_dir", folder, "--model.warmup_steps", "2")
    return folder


def rates(run_dir):
    return curve(run_dir, "lr")


def approx(values):
    return pytest.approx(values, rel=1e-6, abs=1e-12)


def test_the_logged_learning_rate_is_the_steps_own(short):
    assert rates(short) == approx({step: scheduled(step, 20, 2, 1e-3) for step in range(20)})


@pytest.mark.parametrize(
    ("options", "now", "said"),
    [
        (["--trainer.max_epochs", "4"], (40, 2, 1e-3), "steps 40 instead of 20"),
        (
            ["--trainer.max_epochs", "3", "--model.base_lr", "4e-3"],
            (30, 2, 2e-3),
            "learning rate 0.002 instead of 0.001",
        ),
        (["--trainer.max_epochs", "3", "--model.warmup_steps", "25"], (30, 25, 1e-3), "warm-up steps 25 instead of 2"),
        (["--trainer.max_epochs", "3", "--model.min_lr", "1e-4"], (30, 2, 1e-3, 1e-4), "last learning rate 0.0001"),
    ],
)
def test_other_options_are_in_force_from_the_next_step(short, tmp_path, options, now, said, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "run"
    more = ["--model.warmup_steps", "2"] if "--model.warmup_steps" not in options else []
    last = short / "checkpoints" / "last.ckpt"
    with pytest.warns(UserWarning, match="Resumed after step 20 with") as warned:
        run("--run_dir", folder, "--ckpt_path", last, *more, *options)
    assert any(said in str(warning.message) for warning in warned)
    assert not any("exceeds max_steps" in str(warning.message) for warning in warned)
    steps = now[0]
    assert rates(folder) == approx({step: scheduled(step, *now) for step in range(20, steps)})
    assert f"over {steps} steps, {now[1]} of them warm-up" in caplog.text
    final = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert final["global_step"] == steps
    assert {group["initial_lr"] for group in final["optimizer_states"][0]["param_groups"]} == {now[2]}


def test_betas_and_weight_decay_are_those_asked_for(short, tmp_path):
    options = ["--trainer.max_epochs", "3", "--model.warmup_steps", "2", "--model.weight_decay", "0.3"]
    options += ["--model.betas", "[0.8, 0.9]"]
    run("--run_dir", tmp_path / "run", "--ckpt_path", short / "checkpoints" / "last.ckpt", *options)
    final = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    groups = {group["name"]: group for group in final["optimizer_states"][0]["param_groups"]}
    assert groups["decay"]["weight_decay"] == 0.3 and groups["no_decay"]["weight_decay"] == 0.0
    assert all(list(group["betas"]) == [0.8, 0.9] for group in groups.values())


def test_with_the_same_options_nothing_is_said(tmp_path):
    options = ["--model.warmup_steps", "2", "--checkpoint_every_n_steps", "7"]
    run("--run_dir", tmp_path / "a", *options, "--trainer.max_steps", "20")
    state = torch.load(tmp_path / "a" / "checkpoints" / "last.ckpt", weights_only=True)["lr_schedulers"][0]
    assert "_options" not in state and state["last_epoch"] == 20
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run("--run_dir", tmp_path / "a", *options, "--trainer.max_steps", "20", "--ckpt_path", "last")
    assert not [w for w in caught if "Resumed after step" in str(w.message)]
