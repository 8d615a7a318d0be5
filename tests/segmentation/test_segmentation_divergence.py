"""A run that leaves the finite numbers ends, and its weights are neither written nor read."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("mmseg")
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.runner import Runner
from tiny import losses, tiny_config

import nepa_plugin
from nepa_plugin.checkpoints import CheckpointError, read_tensors
from nepa_plugin.segmentation import CheckpointGuardHook, DivergenceError


class Break(Hook):
    """Puts a value into a bias before or after a step."""

    priority = "HIGHEST"

    def __init__(self, step, value=float("nan"), after=False):
        self.step, self.value, self.after = step, value, after

    def _break(self, runner):
        if runner.iter + 1 == self.step:
            with torch.no_grad():
                runner.model.decode_head.conv_seg.bias.fill_(self.value)

    def before_train_iter(self, runner, **kwargs):
        if not self.after:
            self._break(runner)

    def after_train_iter(self, runner, **kwargs):
        if self.after:
            self._break(runner)


def broken(scenes, work_dir, hook, **options):
    cfg = tiny_config(scenes, None, work_dir, iterations=8, train_dataloader__batch_size=2, train_cfg__val_interval=100,
                      default_hooks__checkpoint__save_best=None, **options)  # fmt: skip
    runner = Runner.from_cfg(cfg)
    runner.register_hook(hook)
    return runner


def finite(path):
    return all(v.isfinite().all() for v in read_tensors(path)["state_dict"].values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_loss_that_is_not_finite_ends_the_run(scenes, tmp_path, value):
    with pytest.raises(
        DivergenceError, match=r"loss is (nan|inf) at step 4\. .*iter_2\.pth has finite weights: add --re"
    ):
        broken(scenes, tmp_path, Break(4, value)).train()
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_2.pth"]  # step 4 would have been saved
    assert finite(tmp_path / "iter_2.pth")
    runner = broken(scenes, tmp_path, Break(100), resume=True)
    runner.train()
    assert runner.iter == 8 and list(losses(tmp_path))[-1] == 8


def test_the_message_says_what_to_try(scenes, tmp_path):
    with pytest.raises(
        DivergenceError, match=r"at step 1\. Lower optim_wrapper\.optimizer\.lr .*clip_grad\.max_norm=1"
    ):
        broken(scenes, tmp_path, Break(1)).train()


def test_weights_that_are_not_finite_are_not_written(scenes, tmp_path):
    """The loss of the step was finite, its weights are not."""
    message = r"1 weights, such as decode_head\.conv_seg\.bias, are not finite at step 4; they are not saved"
    with pytest.raises(DivergenceError, match=message):
        broken(scenes, tmp_path, Break(4, after=True)).train()
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_2.pth"]


def test_steps_that_are_tolerated(tmp_path):
    """So many in a row, not in all."""
    nan, hub = float("nan"), MessageHub("tolerated")
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}])
    runner = SimpleNamespace(message_hub=hub, iter=0, work_dir=str(tmp_path), optim_wrapper=optimizer)
    guard = CheckpointGuardHook(tolerate=1)
    for loss in (nan, 1.0, float("inf"), 1.0, nan):
        hub.update_scalar("train/loss", loss)
        guard.after_train_iter(runner, 0)
    hub.update_scalar("train/loss", nan)
    with pytest.raises(DivergenceError, match=r"the step's is 0\.1"):
        guard.after_train_iter(runner, 0)


def test_weights_that_are_not_finite_are_not_read(run, scenes, tmp_path):
    checkpoint = read_tensors(run / "iter_4.pth")
    checkpoint["state_dict"]["backbone.vit.blocks.1.attn.proj.weight"][3, 4] = float("nan")
    torch.save(checkpoint, tmp_path / "nan.pth")
    message = r"nan\.pth holds values that are not finite in .*blocks\.1\.attn\.proj\.weight"
    with pytest.raises(CheckpointError, match=message):
        nepa_plugin.load_backbone(tmp_path / "nan.pth")
    for kind, options in (("test", {}), ("train", {}), ("train", {"resume": True})):
        cfg = tiny_config(
            scenes, None, tmp_path / f"{kind}{len(options)}", load_from=str(tmp_path / "nan.pth"), **options
        )
        with pytest.raises(CheckpointError, match=message):
            getattr(Runner.from_cfg(cfg), kind)()
    with pytest.raises(CheckpointError, match=message):
        Runner.from_cfg(tiny_config(scenes, tmp_path / "nan.pth", tmp_path / "init")).train()
