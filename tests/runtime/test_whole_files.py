"""Files and folders are written whole or not at all, and leftovers of a kill are told from work in progress."""

import json
import os
import socket
import subprocess
import sys

import pytest

from nepa_plugin.runtime.files import PART_PREFIX, part_of, remove_parts, whole_file, whole_folder, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path):
    path, previous = tmp_path / "new" / "a.txt", tmp_path / "new" / "b.txt"
    for text in ("one", "two", "three"):
        with whole_file(path, previous) as part:
            part.write_text(text)
            assert not path.exists() or path.read_text() != text
    assert path.read_text() == "three" and previous.read_text() == "two"
    with pytest.raises(TypeError), whole_file(path, previous) as part:
        part.write_bytes(b"half" + object())
    assert path.read_text() == "three" and previous.read_text() == "two" and names(path.parent) == ["a.txt", "b.txt"]


def test_a_folder_appears_when_it_is_full(tmp_path):
    with whole_folder(tmp_path / "full") as part:
        (part / "x").write_text("1")
        assert not (tmp_path / "full").exists()
    assert names(tmp_path) == ["full"] and names(tmp_path / "full") == ["x"]
    assert (tmp_path / "full").stat().st_mode & 0o777 == 0o777 & ~umask()
    with pytest.raises(FileNotFoundError), whole_folder(tmp_path / "other") as part:
        (part / "x" / "y").write_text("1")
    assert names(tmp_path) == ["full"]
    with pytest.raises(OSError, match="not empty"), whole_folder(tmp_path / "full") as part:
        (part / "y").write_text("1")
    assert names(tmp_path) == ["full"] and names(tmp_path / "full") == ["x"]


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_json_is_never_half(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "new" / "a.json", {"x": object()})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"x": 1} and names(tmp_path / "new") == ["a.json"]


def test_what_a_kill_left_goes_and_what_lives_stays(tmp_path):
    script = """
import os, signal, sys
from pathlib import Path
from nepa_plugin.runtime.files import whole_file, whole_folder
with whole_file(Path(sys.argv[1]) / "file") as part, whole_folder(Path(sys.argv[1]) / "folder") as other:
    part.write_text("half")
    (other / "x").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert len(names(tmp_path)) == 2 and all(name.startswith(PART_PREFIX) for name in names(tmp_path))
    living = tmp_path / f"{PART_PREFIX}file.{socket.gethostname()}.{os.getppid()}"
    elsewhere, old = tmp_path / f"{PART_PREFIX}file.another-host.1", tmp_path / f"{PART_PREFIX}x.another-host.2"
    for path in (living, elsewhere, old):
        path.write_text("half")
    os.utime(old, (0, 0))
    assert len(remove_parts(tmp_path, "folder")) == 1
    assert {path.name for path in remove_parts(tmp_path)} >= {old.name}
    assert names(tmp_path) == sorted([living.name, elsewhere.name])
    remove_parts(tmp_path, everything=True)
    assert names(tmp_path) == []
    assert part_of(tmp_path / "a") == tmp_path / f"{PART_PREFIX}a.{socket.gethostname()}.{os.getpid()}"
