"""Seeds of the steps; the line per epoch, which says what the epoch was."""

from types import SimpleNamespace

import torch
from lightly.models.utils import random_token_mask
from pretraining import curve, run
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.model_summary import get_human_readable_count
from safetensors.torch import load_file

from nepa_plugin import NepaViT
from nepa_plugin.runtime.step_seed import StepSeed
from nepa_plugin.training import callbacks
from nepa_plugin.training.callbacks import LoggedBar

SECONDS = [0.0]


class Slow(Callback):
    """Lets a step of epoch n take n seconds, and a validation batch a hundred."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        SECONDS[0] += trainer.current_epoch + 1

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        SECONDS[0] += 100


def test_each_line_is_its_epochs_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: SECONDS[0]))
    own = ["--trainer.callbacks", '[{"class_path": "test_callbacks.Slow"}]']
    few = ["--trainer.limit_train_batches", "3", "--trainer.check_val_every_n_epoch", "2"]
    run("--run_dir", tmp_path / "run", *own, *few, "--trainer.max_epochs", "5")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    losses, scores = curve(tmp_path / "run"), curve(tmp_path / "run", "val_online_cls_top1")
    assert len(lines) == 5 and list(losses) == list(range(15)) and len(scores) == 2
    for epoch, line in enumerate(lines):
        mean = sum(losses[3 * epoch + step] for step in range(3)) / 3
        score = f"  online probe top-1 {scores[3 * epoch + 2]:.4g}" if epoch % 2 else ""
        speed = f"  images/s {128 / (epoch + 1):.4g}"
        assert line == f"epoch {epoch + 1}/5  step {3 * epoch + 3}  loss {mean:.4g}{score}{speed}"


def test_the_table_of_parts_says_what_is_counted(tmp_path, capsys):
    """Lightning's own would say that everything takes 0 operations."""
    printed = []
    for shown in ("false", "true"):
        run("--run_dir", tmp_path / shown, "--trainer.max_steps", "1", "--trainer.enable_model_summary", shown)
        printed.append(capsys.readouterr().out)
    quiet, out = printed
    assert "online_classifier" not in quiet
    weights = load_file(tmp_path / "true" / "backbone" / "model.safetensors")
    (total,) = [line for line in out.splitlines() if "parameters" in line]
    probe = next(line for line in out.splitlines() if "online_classifier" in line).split("│")[4]
    backbone = next(line for line in out.splitlines() if "backbone" in line and "│" in line).split("│")[4]
    assert backbone.strip() == get_human_readable_count(sum(map(torch.numel, weights.values()))).strip()
    assert probe.strip() and total.split()[0] == total.split()[3]
    assert "FLOP" not in out and "Skipping" not in out


def test_no_two_processes_draw_the_same_masks():
    """MAE's masks of eight processes, in two steps: all different; the factor of RoPE is the same in all of a step."""
    module = NepaViT(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2).train()
    masks, factors = [], {}
    for step in range(2):
        for rank in range(8):
            trainer = SimpleNamespace(global_rank=rank)
            seeding = StepSeed(1337)
            seeding.place = lambda _, step=step, rank=rank: (step, rank)
            seeding.on_train_batch_start(trainer, module, None, 0)
            masks.append(random_token_mask((32, 64), 0.75)[1])
            factors.setdefault(step, []).append(module.rope.get_embed())
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 16
    for same in factors.values():
        assert all(torch.equal(table, same[0]) for table in same)
    assert not torch.equal(factors[0][0], factors[1][0])


def test_the_bar_shows_what_was_logged_and_converts_it_once():
    class Loss(float):
        conversions = 0

        def __float__(self):
            Loss.conversions += 1
            return float.__float__(self)

    bar, logged = LoggedBar(), {}
    trainer = SimpleNamespace(logged_metrics=logged, progress_bar_metrics={}, loggers=[])
    assert "train_loss" not in bar.get_metrics(trainer, None)
    for value in (0.5, 0.25):
        logged["train_loss"] = Loss(value)
        for _ in range(3):
            assert bar.get_metrics(trainer, None)["train_loss"] == value
    assert Loss.conversions == 2
