"""A run that leaves the finite numbers ends at once, keeps its last finite checkpoint, and exports nothing."""

import pytest
import torch
from pretraining import curve, run

import nepa_plugin
from nepa_plugin.methods import NEPA

EVERY = ["--checkpoint_every_n_steps", "1"]


def spoil(monkeypatch, what, at):
    """Make the loss, or a gradient, of the steps ``at`` not a number."""
    original = NEPA.step

    def step(self, views):
        loss, features = original(self, views)
        if self._trainer is not None and self.trainer.global_step in at:  # its cost is counted without one
            factor = float("nan") if what == "loss" else 1.0
            if what == "gradient":
                self.backbone.norm.weight.register_hook(lambda grad: grad * float("inf"))
            return loss * factor, features
        return loss, features

    monkeypatch.setattr(NEPA, "step", step)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_run_ends_and_the_last_finite_checkpoint_stays(what, monkeypatch, tmp_path, capsys):
    spoil(monkeypatch, what, {4})
    run("--run_dir", tmp_path / "run", *EVERY, code=1)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "Training has diverged: 1 step(s) had a loss or gradient that is not finite" in line
    assert "after step 4 and no later than step 5" in line and "Lower base_lr (now 0.002)" in line
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4
    assert all(value.isfinite().all() for value in checkpoint["current_model_state"].values())
    assert not (tmp_path / "run" / "backbone").exists()
    assert max(curve(tmp_path / "run")) <= 4


def test_what_was_not_logged_is_seen_before_a_checkpoint(monkeypatch, tmp_path, capsys):
    spoil(monkeypatch, "loss", {4})
    run("--run_dir", tmp_path / "run", "--checkpoint_every_n_steps", "3", "--trainer.log_every_n_steps", "50", code=1)
    assert "after step 3 and no later than step 6" in capsys.readouterr().err
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3


def test_some_can_be_tolerated(monkeypatch, tmp_path, capsys):
    spoil(monkeypatch, "loss", {4, 6})
    run("--run_dir", tmp_path / "two", "--model.nonfinite_steps", "2")
    model = nepa_plugin.load_backbone(tmp_path / "two" / "backbone")
    assert all(p.isfinite().all() for p in model.parameters())
    run("--run_dir", tmp_path / "one", "--model.nonfinite_steps", "1", code=1)
    assert "2 step(s)" in capsys.readouterr().err


def test_a_learning_rate_that_is_none(tmp_path, capsys):
    for value in ("inf", "nan"):
        run("--run_dir", tmp_path / "run", "--model.base_lr", value, code=2)
        assert f"base_lr: expected float, got {value}." in capsys.readouterr().err
    run("--run_dir", tmp_path / "run", "--model.base_lr", "-1", code=2)
    assert "base_lr must be in [0, 1e+30], got -1.0" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"base_lr must be in \[0, 1e\+30\], got nan"):
        NEPA(4, 0, base_lr=float("nan"))
    run("--run_dir", tmp_path / "run", "--model.base_lr", "1e30", *EVERY, code=1)
    assert "Training has diverged" in capsys.readouterr().err
    assert not (tmp_path / "run" / "backbone").exists()


def test_weights_that_are_not_finite_are_refused_wherever_they_are_read(toy, tmp_path):
    nepa_plugin.save_backbone(toy, tmp_path / "good")
    with torch.no_grad():
        toy.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
    nepa_plugin.save_backbone(toy, tmp_path / "bad")
    message = r"not finite in blocks\.1\.mlp\.fc1\.weight: its training has"
    with pytest.raises(nepa_plugin.CheckpointError, match=message):
        nepa_plugin.load_backbone(tmp_path / "bad")
    with pytest.raises(nepa_plugin.CheckpointError, match="not finite"):
        NEPA(4, 0, backbone_args={"depth": 3}, init_from=str(tmp_path / "bad"))
