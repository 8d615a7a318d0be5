"""Files of tensors are written at once or not at all."""

import os
import subprocess
import sys

import pytest
import torch

from nepa_plugin.checkpoints import CheckpointError, read_tensors, write_tensors
from nepa_plugin.runtime.files import PART_PREFIX


def test_the_one_before_is_kept(tmp_path):
    last, previous = tmp_path / "new" / "last.ckpt", tmp_path / "new" / "previous.ckpt"
    for value in range(3):
        write_tensors({"value": torch.tensor(value)}, last, previous)
        assert int(read_tensors(last)["value"]) == value
        assert not previous.exists() if value == 0 else int(read_tensors(previous)["value"]) == value - 1
    assert {path.name for path in last.parent.iterdir()} == {"last.ckpt", "previous.ckpt"}
    write_tensors({"value": torch.tensor(7)}, last)
    assert int(read_tensors(previous)["value"]) == 1


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    write_tensors({"value": torch.tensor(1)}, path)

    def full(content, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    message = r"last\.ckpt could not be written: No space left on device\. The one before it is kept\. Make room"
    with pytest.raises(CheckpointError, match=message):
        write_tensors({"value": torch.tensor(2)}, path, tmp_path / "previous.ckpt")
    assert int(read_tensors(path)["value"]) == 1 and [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


WRITER = """
import sys, torch
from nepa_plugin.checkpoints import write_tensors
for value in range(10**6):
    write_tensors({"value": torch.tensor(value), "more": torch.zeros(200_000)}, sys.argv[1], sys.argv[2])
    print(value, flush=True)
"""


def test_a_kill_at_any_moment_leaves_whole_files(tmp_path):
    """Also where the temporary folder is elsewhere, which is not used."""
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    for lines in (1, 2, 4):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(last), str(previous)],
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ, TMPDIR="/dev/shm" if os.path.isdir("/dev/shm") else str(tmp_path)),
        )
        said = [process.stdout.readline() for _ in range(lines)]
        process.kill()
        written = int((said + process.stdout.read().splitlines())[-1])
        process.wait()
        found = [read_tensors(path) for path in (last, previous) if path.exists()]
        assert all(checkpoint["more"].shape == (200_000,) for checkpoint in found)
        newest, *before = (int(checkpoint["value"]) for checkpoint in found)
        assert newest in (written, written + 1) and all(value in (newest, newest - 1) for value in before[: newest > 0])
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(PART_PREFIX)} == {"last.ckpt", "previous.ckpt"}
