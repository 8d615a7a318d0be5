"""One run at a time writes to a run folder, and the next one finds its way in whatever is there."""

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
from pretraining import ROOT, curve, run

from nepa_plugin.checkpoints import CheckpointError, read_tensors
from nepa_plugin.methods import NEPA
from nepa_plugin.training.metrics_file import MetricsFile
from nepa_plugin.training.run_folder import RunFolder, UsageError


class Stop(Exception):
    pass


def stop_at(monkeypatch, step, *args):
    """Run, and fail before the given step, as a kill would."""
    original = NEPA.on_train_batch_start

    def bomb(self, batch, batch_idx):
        if self.trainer.global_step == step:
            raise Stop
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(NEPA, "on_train_batch_start", bomb)
        with pytest.raises(Stop):
            run(*args)


def weights(run_dir, name="last.ckpt"):
    return read_tensors(run_dir / "checkpoints" / name)["current_model_state"]


def assert_equal(one, other):
    assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "run"
    run("--run_dir", folder)
    return folder


def test_a_damaged_checkpoint_gives_way_to_the_one_before(reference, monkeypatch, tmp_path, recwarn):
    folder = tmp_path / "run"
    stop_at(monkeypatch, 8, "--run_dir", folder, "--checkpoint_every_n_steps", 3)
    checkpoints = folder / "checkpoints"
    assert [read_tensors(checkpoints / f"{name}.ckpt")["global_step"] for name in ("previous", "last")] == [3, 6]
    (checkpoints / "last.ckpt").write_bytes((checkpoints / "last.ckpt").read_bytes()[:1000])
    (checkpoints / ".saving-last.ckpt.node.7").write_bytes(b"half")
    run("--run_dir", folder, "--ckpt_path", "auto", "--checkpoint_every_n_steps", 3)
    (said,) = [str(w.message) for w in recwarn if "Going on from the checkpoint before it" in str(w.message)]
    assert "last.ckpt cannot be read as tensors only" in said and said.endswith("previous.ckpt.")
    assert curve(folder) == curve(reference)
    assert_equal(weights(folder), weights(reference))
    assert {path.name for path in checkpoints.iterdir()} == {"last.ckpt", "previous.ckpt"}
    with (folder / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert steps == list(range(20))  # what was trained again is there once


def test_without_any_whole_checkpoint(reference, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    for name in ("last", "previous"):
        (folder / "checkpoints" / f"{name}.ckpt").write_bytes(b"")
    run("--run_dir", folder, "--ckpt_path", "last", code=2)
    assert "There is no other checkpoint in" in capsys.readouterr().err.splitlines()[-1]
    assert curve(folder) == curve(reference)


def test_a_run_that_failed_before_its_first_checkpoint_is_put_aside(reference, monkeypatch, tmp_path, capsys):
    folder = tmp_path / "run"
    stop_at(monkeypatch, 2, "--run_dir", folder)
    run("--run_dir", folder, "--ckpt_path", "last", code=2)
    assert "it failed before its first checkpoint. Leave the option out" in capsys.readouterr().err
    stop_at(monkeypatch, 1, "--run_dir", folder)
    run("--run_dir", folder, "--ckpt_path", "auto")
    assert curve(folder) == curve(reference)
    assert [list(curve(folder / f"failed-{n}")) for n in (1, 2)] == [[0, 1], [0]]
    assert (folder / "config.yaml").is_file() and not (folder / "config-2.yaml").exists()
    run("--run_dir", folder, code=2)
    assert "exists. Choose another with --run_dir" in capsys.readouterr().err


def test_another_folder_is_not_put_aside(tmp_path):
    (tmp_path / "config.yaml").write_text("theirs: 1")
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(UsageError, match="exists"):
        RunFolder(tmp_path).resume_from(None)
    RunFolder(tmp_path).prepare()
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "thesis.tex"}


HOLD = """
import sys, time
from nepa_plugin.training.run_folder import RunFolder
folder = RunFolder(sys.argv[1])
folder.lock()
print("locked", flush=True)
time.sleep(600)
"""


def test_one_run_at_a_time(tmp_path, capsys):
    folder = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout.readline() == b"locked\n"
    run("--run_dir", folder, "--ckpt_path", "auto", code=2)
    said = f"error: {folder} is in use by process {process.pid} on {socket.gethostname()}. Wait for it"
    assert capsys.readouterr().err.splitlines()[-1].startswith(said)
    assert {path.name for path in folder.iterdir()} == {".lock"}
    process.kill()  # a stale lock is nobody's
    process.wait()
    other = RunFolder(folder)
    other.lock()
    assert (folder / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    other.unlock()
    assert not folder.exists()


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    run("--run_dir", tmp_path / "file" / "run", code=2)
    assert "cannot be written to: Not a directory. Choose another folder." in capsys.readouterr().err


def test_bad_input_leaves_no_folder(tmp_path, capsys):
    run("--run_dir", tmp_path / "run", "--data.batch_size_per_device", 4096, "--global_batch_size", "null", code=2)
    assert "fewer than one batch" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_sigterm_in_a_validation_waits_for_its_end(reference, monkeypatch, tmp_path):
    """Lightning would break it off, save the averaged weights as the trained ones, and never validate that epoch."""
    original = NEPA.validation_step

    def validate(self, batch, batch_idx):
        if self.trainer.global_step == 10 and batch_idx == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(NEPA, "validation_step", validate)
        run("--run_dir", folder, code=143)
    name = "val_online_cls_top1"
    assert list(curve(folder, name)) == [9] and list(curve(folder)) == list(range(10))
    assert read_tensors(folder / "checkpoints" / "last.ckpt")["global_step"] == 10
    run("--run_dir", folder, "--ckpt_path", "last")
    assert curve(folder, name) == curve(reference, name)
    assert_equal(weights(folder), weights(reference))


def test_a_kill_in_a_validation_repeats_its_epoch(reference, monkeypatch, tmp_path):
    """The step before a validation is saved after it."""

    def validate(self, batch, batch_idx):
        raise Stop

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(NEPA, "validation_step", validate)
        with pytest.raises(Stop):
            run("--run_dir", folder, "--checkpoint_every_n_steps", 5, "--trainer.num_sanity_val_steps", 0)
    assert read_tensors(folder / "checkpoints" / "last.ckpt")["global_step"] == 5
    run("--run_dir", folder, "--checkpoint_every_n_steps", 5, "--ckpt_path", "last")
    for name in ("train_loss", "val_online_cls_top1"):
        assert curve(folder, name) == curve(reference, name)


SIMSIAM = ["--model", "SimSiam", "--model.backbone_args.attention", "bidirectional"]


@pytest.mark.parametrize(
    ("edit", "options", "message"),
    [
        (lambda c: c.pop("optimizer_states"), [], "is no checkpoint of a training run: it has no optimizer_states"),
        (lambda c: c["optimizer_states"][0]["param_groups"].pop(), [], "holds an optimizer of"),
        (lambda c: c["current_model_state"].update(x=torch.zeros(1)), [], "unexpected: x"),
        (lambda c: c["current_model_state"]["backbone.cls_token"].fill_(float("nan")), [], "not finite in backbone"),
        (lambda c: None, SIMSIAM, "does not fit SimSiam; nothing was loaded. missing: projection_head"),
        (lambda c: None, ["--model.backbone_args.embed_dim", "64"], "backbone.cls_token is (1, 1, 32), the model has"),
    ],
)
def test_a_checkpoint_that_cannot_go_on(edit, options, message, reference, tmp_path, capsys):
    checkpoint = read_tensors(reference / "checkpoints" / "last.ckpt")
    edit(checkpoint)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    run("--run_dir", tmp_path / "run", *options, "--ckpt_path", tmp_path / "a.ckpt", code=2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {tmp_path / 'a.ckpt'} ") and message in line
    assert not (tmp_path / "run").exists()


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_file_of_metrics_outlives_a_kill(tmp_path, monkeypatch):
    path = tmp_path / "metrics.csv"
    writer = MetricsFile(str(tmp_path))
    for step in range(3):
        writer.log_metrics({"loss": step / 10}, step)
        writer.save()
    # a kill while a column is added, which Lightning does in place
    monkeypatch.setattr(csv.DictWriter, "writerows", lambda *args: (_ for _ in ()).throw(Stop))
    writer.log_metrics({"accuracy": 0.5}, 2)
    with pytest.raises(Stop):
        writer.save()
    monkeypatch.undo()
    assert [row["loss"] for row in rows(path)] == ["0.0", "0.1", "0.2"]
    # a kill in the middle of a line
    with path.open("a") as file:
        file.write("0.3")
    writer = MetricsFile(str(tmp_path))
    assert [row["step"] for row in rows(path)] == ["0", "1", "2"]
    writer.log_metrics({"accuracy": 0.5}, 2)
    writer.save()
    assert rows(path)[-1] == {"accuracy": "0.5", "loss": "", "step": "2"} and len(rows(path)) == 4
    writer.keep_before(2)
    assert [row["step"] for row in rows(path)] == ["0", "1"] and list(rows(path)[0]) == ["accuracy", "loss", "step"]


def test_errors_name_the_checkpoint(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match=r"x\.ckpt cannot be read"):
        RunFolder(tmp_path / "run").resume_from(str(tmp_path / "x.ckpt"))
