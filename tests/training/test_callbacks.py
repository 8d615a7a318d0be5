"""The line per epoch, which says what the epoch was."""

from types import SimpleNamespace

from pretraining import curve, run
from pytorch_lightning.callbacks import Callback

from nepa_plugin.training import callbacks

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
        score = f"  val top-1 {scores[3 * epoch + 2]:.4g}" if epoch % 2 else ""
        speed = f"  images/s {128 / (epoch + 1):.4g}"
        assert line == f"epoch {epoch + 1}/5  step {3 * epoch + 3}  loss {mean:.4g}{score}{speed}"
