"""An image folder into shards, and the index of them."""

import json
import runpy
import sys
import tarfile
from pathlib import Path

import pytest
from photos import photo_folder
from refusal import refusal

from nepa_plugin.data.files import find_bad_images
from nepa_plugin.data.packing import make_shards
from nepa_plugin.data.shards import open_shards, read_shard

TOOL = Path(__file__).parents[2] / "tools" / "make_shards.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return photo_folder(tmp_path_factory.mktemp("photos") / "images", 20)


def tool(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["make_shards.py", *map(str, args)])
    runpy.run_path(str(TOOL), run_name="__main__")


def contents(shards):
    return [sample for url in open_shards(str(shards)).urls for sample in read_shard(url)]


def test_the_shards_hold_the_files_as_they_are(folder, tmp_path):
    index = make_shards(folder, tmp_path / "shards", images_per_shard=8)
    assert index == json.loads((tmp_path / "shards" / "index.json").read_text())
    names = [f"images-{i:06d}.tar" for i in range(3)]
    assert index["shards"] == [{"name": n, "images": c} for n, c in zip(names, (8, 8, 4), strict=True)]
    assert (index["images"], index["classes"]) == (20, ["a", "b"])
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == [*names, "index.json"]
    for url, shard in zip(open_shards(str(tmp_path / "shards")).urls, index["shards"], strict=True):
        with tarfile.open(url) as tar:
            assert len(tar.getmembers()) == 2 * shard["images"]
    files = {(path.read_bytes(), "ab".index(path.parent.name)) for path in folder.rglob("*.jpg")}
    packed = contents(tmp_path / "shards")
    assert {(data, label) for _, data, label in packed} == files and len(packed) == 20
    assert [label for _, _, label in packed[:8]] not in ([0] * 8, [1] * 8)  # classes are mixed


def test_the_same_seed_writes_the_same_bytes(folder, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_shards(folder, tmp_path / name, 10, seed)
    first, same, other = ((tmp_path / name / "images-000001.tar").read_bytes() for name in "abc")
    assert first == same != other


def test_a_flat_folder_has_no_classes(folder, tmp_path):
    index = make_shards(folder / "a", tmp_path / "shards")
    assert index["classes"] == [] and index["images"] == 10
    assert {label for _, _, label in contents(tmp_path / "shards")} == {0}


def test_the_command_packs_and_refuses_to_overwrite(folder, tmp_path, monkeypatch, capsys):
    tool(monkeypatch, folder, tmp_path / "shards", "--images_per_shard", 6)
    assert "20 images in 4 shard(s), 2 classes" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    assert "shards exists. Choose another folder" in refusal(capsys, tool, monkeypatch, folder, tmp_path / "shards")
    assert {path: path.read_bytes() for path in (tmp_path / "shards").iterdir()} == before
    new = tmp_path / "new"
    assert "error: make_shards: no folder at" in refusal(capsys, tool, monkeypatch, tmp_path / "nothing", new)
    said = refusal(capsys, tool, monkeypatch, folder, new, "--images_per_shard", 0)
    assert said == "error: images_per_shard must be at least 1, got 0."
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_unreadable_files_are_refused_or_left_out(tmp_path):
    folder = photo_folder(tmp_path / "images", 4)
    (folder / "a" / "001.jpg").write_bytes(b"no image")
    assert find_bad_images(folder, ["a/000.jpg", "a/001.jpg"]) == ["a/001.jpg"]
    with pytest.raises(ValueError, match=r"1 file\(s\) cannot be read as images: .*a/001\.jpg \(damaged\).*--skip_bad"):
        make_shards(folder, tmp_path / "shards")
    assert make_shards(folder, tmp_path / "shards", skip_bad=True)["images"] == 3
    assert b"no image" not in {data for _, data, _ in contents(tmp_path / "shards")}


def test_nothing_is_left_of_a_failure(folder, tmp_path, monkeypatch):
    original, calls = Path.read_bytes, []

    def full_disk(path):
        calls.append(path)
        if len(calls) > 12:
            raise OSError("No space left on device")
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make_shards(folder, tmp_path / "shards", images_per_shard=5)
    assert list(tmp_path.iterdir()) == []


def test_the_index_of_shards_that_something_else_made(folder, tmp_path, monkeypatch, capsys):
    index = make_shards(folder, tmp_path / "shards", images_per_shard=8)
    (tmp_path / "shards" / "index.json").unlink()
    pattern = f"{tmp_path}/shards/images-{{000000..000002}}.tar"
    tool(monkeypatch, "--index", pattern, tmp_path / "shards" / "index.json")
    assert "20 images in 3 shard(s), 0 classes" in capsys.readouterr().out
    assert json.loads((tmp_path / "shards" / "index.json").read_text()) == index | {"classes": []}
    assert len(open_shards(pattern)) == 20
    index = tmp_path / "shards" / "index.json"
    assert "index.json exists" in refusal(capsys, tool, monkeypatch, "--index", pattern, index)
