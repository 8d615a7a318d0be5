"""Kills and full disks: at every moment, what a run has saved is whole, and it goes on from there to the same end."""

import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from pretraining import ROOT, command, curve, run

from nepa_plugin.checkpoints import read_tensors


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "run"
    run("--run_dir", folder)
    return folder


def assert_same_end(one, other):
    states = [read_tensors(folder / "checkpoints" / "last.ckpt")["current_model_state"] for folder in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert curve(one) == curve(other)


def kill_while_saving(run_dir, times):
    """Start the command, and kill it while it is writing its ``times``-th checkpoint or later."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    if os.path.isdir("/dev/shm"):
        environment["TMPDIR"] = "/dev/shm"  # another file system than the run's
    arguments = command(run_dir, "--checkpoint_every_n_steps", "1", "--ckpt_path", "auto")
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    folder = run_dir / "checkpoints"
    while process.poll() is None:
        logged = len(curve(run_dir)) if (run_dir / "metrics.csv").is_file() else 0
        if logged >= times and (folder / "last.ckpt").is_file() and any(folder.glob(".saving-last.ckpt*")):
            break
        time.sleep(0.0005)
    process.kill()
    assert process.wait() == -9, process.stderr.read()[-2000:]


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written(reference, tmp_path):
    folder = tmp_path / "run"
    for times in (2, 9):
        kill_while_saving(folder, times)
        for path in (folder / "checkpoints").glob("*.ckpt"):
            assert read_tensors(path)["global_step"] >= 1
        assert read_tensors(folder / "checkpoints" / "last.ckpt")["global_step"] >= times - 1
    run("--run_dir", folder, "--ckpt_path", "auto")
    assert_same_end(folder, reference)
    assert not list(folder.rglob(".saving-*"))


@pytest.fixture
def small_disk(tmp_path):
    """Return a function that mounts a file system of so many bytes; a test that cannot have one is skipped."""
    mounted = []

    def mount(size):
        place = tmp_path / "disk"
        place.mkdir()
        arguments = ["mount", "-t", "tmpfs", "-o", f"size={size // 1024}k", "tmpfs", str(place)]
        try:
            done = subprocess.run(arguments, capture_output=True, check=False).returncode == 0
        except OSError:
            done = False
        if not done:
            pytest.skip("no small file system can be mounted here: that takes root on Linux")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=False)


def test_a_full_disk_keeps_the_older_checkpoint(reference, small_disk, tmp_path, capsys):
    size = (reference / "checkpoints" / "last.ckpt").stat().st_size
    disk = small_disk(int(2.6 * size))  # for two checkpoints, and not for a third beside them
    run("--run_dir", disk / "run", "--checkpoint_every_n_steps", 3, "--trainer.logger", "false", code=2)
    line = capsys.readouterr().err.splitlines()[-1]
    last = disk / "run" / "checkpoints" / "last.ckpt"
    assert line.startswith(f"error: {last} could not be written: ") and "The one before it is kept. Make room" in line
    assert [read_tensors(last.with_name(name))["global_step"] for name in ("last.ckpt", "previous.ckpt")] == [6, 3]
    assert sorted(path.name for path in last.parent.iterdir()) == ["last.ckpt", "previous.ckpt"]
    # the disk is made larger, and the run goes on to the same end
    subprocess.run(["mount", "-o", f"remount,size={20 * size // 1024}k", str(disk)], check=True)
    run("--run_dir", disk / "run", "--checkpoint_every_n_steps", 3, "--ckpt_path", "last")
    states = [read_tensors(path)["current_model_state"] for path in (last, reference / "checkpoints" / "last.ckpt")]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_a_folder_that_takes_no_files(tmp_path, capsys, monkeypatch):
    """Said before any image is looked at."""
    original = Path.open

    def refuse(self, *args, **kwargs):
        if self.name == ".lock":
            raise PermissionError(13, "Permission denied", str(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    run("--run_dir", tmp_path / "run", code=2)
    assert capsys.readouterr().err.endswith("run cannot be written to: Permission denied. Choose another folder.\n")
