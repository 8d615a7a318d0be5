"""Checkpoints of mmengine under kills, full disks and damage."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmseg")
from mmengine.hooks import Hook
from mmengine.runner import Runner
from tiny import losses, tiny_config

from nepa_plugin.checkpoints import CheckpointError, read_tensors
from nepa_plugin.segmentation.saving import newest_whole_checkpoint

SHORT = {
    "train_dataloader__batch_size": 2,
    "train_cfg__val_interval": 100,
    "default_hooks__checkpoint__save_best": None,
}


def config(scenes, work_dir, iterations=6, **options):
    return tiny_config(scenes, None, work_dir, iterations, **SHORT | options)


def steps(work_dir):
    return {path.name: read_tensors(path)["meta"]["iter"] for path in work_dir.glob("*.pth")}


class KillWhileSaving(Hook):
    """Ends the process with SIGKILL when half of the checkpoint of a step is written."""

    priority = "HIGHEST"

    def after_train_iter(self, runner, **kwargs):
        if runner.iter + 1 == 4:

            def half(path, data):
                with path.open("wb") as file:
                    file.write(data[: len(data) // 2])
                    file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)

            Path.write_bytes = half


SCRIPT = """
import sys
sys.path[:0] = {path!r}
from test_saving import *
runner = Runner.from_cfg(config({scenes!r}, {work_dir!r}, **{options!r}))
runner.register_hook(KillWhileSaving())
runner.train()
"""


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs another file system")
def test_a_kill_while_saving(scenes, tmp_path):
    """With the temporary folder on another file system, and one checkpoint kept: the one before is whole, and the
    next start removes what was left over and goes on."""
    options = {"default_hooks__checkpoint__max_keep_ckpts": 1}
    code = SCRIPT.format(path=[str(Path(__file__).parent)], scenes=str(scenes), work_dir=str(tmp_path), options=options)
    environment = dict(os.environ, TMPDIR="/dev/shm", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert steps(tmp_path) == {"iter_2.pth": 2}
    assert len(list(tmp_path.glob(".saving-iter_4.pth*"))) == 1
    Runner.from_cfg(config(scenes, tmp_path, resume=True, **options)).train()
    assert steps(tmp_path) == {"iter_6.pth": 6}
    assert not list(tmp_path.glob(".saving-*"))
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]


class FullDisk(Hook):
    """Lets no file grow beyond 100 kB from a step on: a checkpoint has about 1 MB, a log less."""

    priority = "HIGHEST"

    def after_train_iter(self, runner, **kwargs):
        if runner.iter + 1 == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


def test_a_full_disk(scenes, tmp_path):
    runner = Runner.from_cfg(config(scenes, tmp_path, default_hooks__checkpoint__max_keep_ckpts=1))
    runner.register_hook(FullDisk())
    try:
        with pytest.raises(
            CheckpointError, match=r"iter_4\.pth could not be written: File too large\. The checkpoints b"
        ):
            runner.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert steps(tmp_path) == {"iter_2.pth": 2} and not list(tmp_path.glob(".saving-*"))


def test_the_best_is_replaced_not_removed_first(scenes, tmp_path):
    """Every validation is better than the one before; one best and one last checkpoint stay."""
    cfg = config(
        scenes, tmp_path, 4, train_cfg__val_interval=1, default_hooks__checkpoint__interval=1,
        default_hooks__checkpoint__save_best="mIoU", default_hooks__checkpoint__max_keep_ckpts=1,
    )  # fmt: skip
    runner = Runner.from_cfg(cfg)

    class Better(Hook):
        priority = "HIGHEST"

        def after_val_epoch(self, runner, metrics=None):
            metrics["mIoU"] = float(runner.iter)

    runner.register_hook(Better())
    runner.train()
    assert steps(tmp_path) == {"iter_4.pth": 4, "best_mIoU_iter_4.pth": 4}


class Logger:
    def __init__(self):
        self.said = []

    def warning(self, text):
        self.said.append(text)


@pytest.fixture
def two(tmp_path):
    """Checkpoints of two steps; the last is iter_4.pth."""
    for i, step in enumerate((2, 4)):
        torch.save({"state_dict": {"x": torch.arange(5000) + step}}, tmp_path / f"iter_{step}.pth")
        os.utime(tmp_path / f"iter_{step}.pth", (i, i))
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_4.pth"))
    return tmp_path


def cut(path):
    path.write_bytes(path.read_bytes()[:20_000])


def flip(path):
    data = bytearray(path.read_bytes())
    data[20_000] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def test_the_last_checkpoint_is_taken(two):
    logger = Logger()
    os.utime(two / "iter_2.pth")  # newer, but not the last of the run
    assert newest_whole_checkpoint(two, logger) == str(two / "iter_4.pth") and logger.said == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [(cut, "is cut off"), (empty, "it is empty"), (flip, "another checksum"), (os.unlink, "No checkpoint at")],
)
def test_a_damaged_last_checkpoint(two, damage, said):
    logger = Logger()
    damage(two / "iter_4.pth")
    assert newest_whole_checkpoint(two, logger) == str(two / "iter_2.pth")
    (line,) = logger.said
    assert said in line and "iter_4.pth" in line and line.endswith(f"Goes on from {two / 'iter_2.pth'} instead.")


@pytest.mark.parametrize("text", ["", "/moved/away/iter_4.pth"])
def test_a_pointer_that_leads_nowhere(two, text):
    (two / "last_checkpoint").write_text(text)
    assert newest_whole_checkpoint(two, Logger()) == str(two / "iter_4.pth")


def test_all_are_damaged(two):
    cut(two / "iter_2.pth")
    empty(two / "iter_4.pth")
    with pytest.raises(CheckpointError, match=r"None of the 2 checkpoint\(s\) of .*Choose another --work-dir"):
        newest_whole_checkpoint(two, Logger())


def test_nothing_to_resume(tmp_path):
    assert newest_whole_checkpoint(tmp_path, Logger()) is None


def test_a_run_resumes_from_the_one_before(scenes, tmp_path):
    Runner.from_cfg(config(scenes, tmp_path, 4)).train()
    whole = read_tensors(tmp_path / "iter_4.pth")["state_dict"]
    cut(tmp_path / "iter_4.pth")
    Runner.from_cfg(config(scenes, tmp_path, 4, resume=True)).train()
    assert steps(tmp_path) == {"iter_2.pth": 2, "iter_4.pth": 4}
    assert whole.keys() == read_tensors(tmp_path / "iter_4.pth")["state_dict"].keys()


def test_no_second_run_beside_one_that_was_killed_early(scenes, tmp_path):
    (tmp_path / "iter_2.pth").write_bytes(b"")  # and no last_checkpoint yet
    with pytest.raises(FileExistsError, match="Add --resume"):
        Runner.from_cfg(config(scenes, tmp_path)).train()
