"""The learning rate of every step of a resumed run, against a formula."""

import json

import pytest
import torch

pytest.importorskip("mmseg")
from mmengine.runner import Runner
from tiny import losses, tiny_config

from nepa_plugin.checkpoints import CheckpointError, read_tensors
from nepa_plugin.segmentation import ConfigError, SegmentationFolder

PEAK, DECAY, BLOCKS = 3e-3, 0.8, 4


def lr(step, length, warmup=2, peak=PEAK):
    """Linear from 1e-6 of the peak to the peak in `warmup` steps, then linear to zero at the last of `length` steps."""
    if step < warmup:
        return peak * (1e-6 + (1 - 1e-6) * step / max(warmup - 1, 1))
    return peak * (1 - (step - warmup) / (length - 1 - warmup))


def options(length, warmup=2, peak=PEAK, decay=DECAY, **more):
    return {
        "iterations": length,
        "train_cfg__val_interval": 100,
        "default_hooks__checkpoint__save_best": None,
        "default_hooks__checkpoint__interval": 1,
        "default_hooks__checkpoint__max_keep_ckpts": -1,
        "train_dataloader__batch_size": 2,
        "param_scheduler__0__end": warmup,
        "param_scheduler__1__begin": warmup,
        "optim_wrapper__optimizer__lr": peak,
        "optim_wrapper__paramwise_cfg__layer_decay": decay,
    } | more


@pytest.fixture(scope="module")
def start(scenes, backbone_folder, tmp_path_factory):
    """Eight steps, of which iter_5.pth and the others are there to resume from."""
    work_dir = tmp_path_factory.mktemp("run")
    Runner.from_cfg(tiny_config(scenes, backbone_folder, work_dir, **options(8))).train()
    return work_dir


@pytest.fixture
def resume(start, scenes, backbone_folder, tmp_path):
    """Resume after step 5 with other options; return the log and the run folder."""

    def go(length, **kwargs):
        cfg = tiny_config(
            scenes,
            backbone_folder,
            tmp_path,
            resume=True,
            load_from=str(start / "iter_5.pth"),
            **options(length, **kwargs),
        )
        Runner.from_cfg(cfg).train()
        (log,) = tmp_path.glob("*/*.log")
        return log.read_text(), tmp_path

    return go


def logged(work_dir):
    """The learning rate of the heads by step, from 1."""
    (file,) = work_dir.glob("*/vis_data/2*.json")
    rows = [json.loads(line) for line in file.open()]
    return {row["step"]: row["base_lr"] for row in rows if "loss" in row}


def groups(work_dir, step):
    return read_tensors(work_dir / f"iter_{step}.pth")["optimizer"]["param_groups"]


def test_a_run_that_was_not_stopped(start):
    assert list(logged(start)) == list(range(1, 9))
    rates = [max(group["lr"] for group in groups(start, step)) for step in range(1, 8)]
    assert rates == pytest.approx([lr(step, 8) for step in range(1, 8)])  # iter_N.pth holds the rate of the next step


def test_the_same_config_goes_on_to_the_last_digit(resume, start, monkeypatch):
    read = []
    load = SegmentationFolder.prepare_data
    monkeypatch.setattr(SegmentationFolder, "prepare_data", lambda self, idx: read.append(idx) or load(self, idx))
    log, work_dir = resume(8)
    assert "Resumed after" not in log and len(read) == 2 * 3 + 7  # no image of the steps before; and the validation's
    for step in (6, 7, 8):
        assert groups(work_dir, step) == groups(start, step)
    assert losses(work_dir) == {step: loss for step, loss in losses(start).items() if step > 5}
    one, other = (read_tensors(folder / "iter_8.pth")["state_dict"] for folder in (start, work_dir))
    assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"length": 12}, "param_scheduler.1.end 12 instead of 8"),
        ({"length": 7}, "param_scheduler.1.end 7 instead of 8"),
        ({"length": 8, "peak": 1e-3}, "peak learning rate 0.001 instead of 0.003"),
        ({"length": 12, "warmup": 8}, "param_scheduler.0.end 8 instead of 2"),
        ({"length": 10, "peak": 2e-3, "warmup": 4}, "param_scheduler.0.end 4 instead of 2"),
    ],
)
def test_another_schedule_is_followed_from_the_position_on(resume, change, said):
    log, work_dir = resume(**change)
    assert "Resumed after step 5 with " in log and said in log
    arguments = {"warmup": 2, "peak": PEAK} | change
    for step in range(6, change["length"]):
        head = lr(step, **arguments)
        for group in groups(work_dir, step):
            # blocks, and the embedding before them, have a fraction each
            layer = {"embedding": 0, "final": BLOCKS + 1}.get(group["name"].split()[0])
            layer = int(group["name"].split()[1]) + 1 if layer is None else layer
            assert group["lr"] == pytest.approx(head * DECAY ** (BLOCKS + 1 - layer))
            assert group["initial_lr"] == pytest.approx(arguments["peak"] * DECAY ** (BLOCKS + 1 - layer))


def test_a_longer_run_is_that_of_an_unbroken_one_to_the_last_digit(resume, scenes, backbone_folder, tmp_path):
    _, resumed = resume(10)
    cfg = tiny_config(scenes, backbone_folder, tmp_path / "unbroken", **options(10))
    Runner.from_cfg(cfg).train()
    for step in range(6, 11):
        rates = [[group["lr"] for group in groups(folder, step)] for folder in (resumed, tmp_path / "unbroken")]
        assert rates[0] == rates[1]


def test_layer_decay_and_options_of_the_optimizer_are_those_asked_for_now(resume):
    log, work_dir = resume(8, decay=0.5, optim_wrapper__optimizer__weight_decay=0.1)
    assert "another decay of the learning rate over the layers" in log and "weight_decay 0.1 instead of 0.05" in log
    by_name = {group["name"]: group for group in groups(work_dir, 6)}
    assert by_name["block 0"]["lr"] == pytest.approx(lr(6, 8) * 0.5**BLOCKS)
    assert by_name["block 0"]["weight_decay"] == 0.1
    assert by_name["block 0 (no weight decay)"]["weight_decay"] == 0


def test_the_message_says_both_rates(resume):
    log, _ = resume(12)
    assert f"goes on with {lr(5, 12):.4g}, where the old schedule had {lr(5, 8):.4g}." in log


def test_a_checkpoint_past_the_end(resume):
    with pytest.raises(ConfigError, match=r"at step 5, past the end of the run: train_cfg\.max_iters is 4"):
        resume(4)


def test_a_finished_run(resume):
    log, work_dir = resume(5)
    assert "at step 5 of 5: there is nothing left to train" in log
    assert not list(work_dir.glob("*.pth"))


def test_other_groups_are_an_error(resume):
    with pytest.raises(CheckpointError, match=r"optimizer has \d+ parameters in \d+ groups, this run's"):
        resume(8, model__backbone__frozen_stages=2)


def test_a_schedule_that_ends_at_zero_before_the_run(scenes, backbone_folder, tmp_path):
    cfg = tiny_config(scenes, backbone_folder, tmp_path, **options(8, param_scheduler__1__end=6))
    with pytest.raises(
        ConfigError, match=r"ends at 6 with a learning rate of 0, train_cfg\.max_iters is 8: the last 2"
    ):
        Runner.from_cfg(cfg).train()
