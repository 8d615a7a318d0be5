"""Shards: each image once per epoch, on one rank, in an order that a resumed run goes on with."""

import json
import shutil
import sys
import tarfile
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
from photos import photo_folder
from recorder import record

from nepa_plugin.data import DataError, ImageData, NEPATransform
from nepa_plugin.data.packing import make_shards
from nepa_plugin.data.pipelines import build_pipeline
from nepa_plugin.data.shards import ShardDataset, ShardLoader, open_shards, read_shard
from nepa_plugin.training.callbacks import LastCheckpoint


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """48 images in shards of 7, the last of 6."""
    root = tmp_path_factory.mktemp("packed")
    make_shards(photo_folder(root / "images", 48), root / "shards", images_per_shard=7)
    return root / "shards"


@pytest.fixture
def copy(packed, tmp_path):
    """A copy of the shards to break."""
    for path in packed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def loader(folder, position=(0, 0), workers=0, pipeline="tensor", seed=3, allow_pipe=False, **options):
    options = {"batch_size": 4, "shuffle_buffer": 5} | options
    dataset = ShardDataset(
        open_shards(str(folder), allow_pipe), build_pipeline(pipeline, NEPATransform(24), "NEPA"), seed=seed, **options
    )
    return ShardLoader(dataset, lambda length: position, workers)


def names(batches):
    return [[name.rsplit("/", 1)[-1] for name in batch[2]] for batch in batches]


def flat(batches):
    return [name for batch in names(batches) for name in batch]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_every_image_once_over_all_ranks(packed, workers, world_size):
    ranks = [loader(packed, (2, 0), workers, rank=r, world_size=world_size) for r in range(world_size)]
    batches = [list(rank) for rank in ranks]
    assert [len(b) for b in batches] == [len(rank) for rank in ranks] == [12 // world_size] * world_size
    seen = [name for b in batches for name in flat(b)]
    assert len(seen) == 48 and sorted(seen) == [f"{i:09d}.jpg" for i in range(48)]
    assert all(batch[0][0].shape == (4, 3, 24, 24) for b in batches for batch in b)


def test_what_fills_no_global_batch_is_left_out_on_all_ranks_alike(packed):
    ranks = [list(loader(packed, rank=r, world_size=2, batch_size=5, workers=2)) for r in range(2)]
    assert [len(batches) for batches in ranks] == [4, 4]
    seen = [name for batches in ranks for name in flat(batches)]
    assert len(seen) == len(set(seen)) == 40
    accumulated = [list(loader(packed, rank=r, world_size=2, accumulate=4, workers=2)) for r in range(2)]
    assert [len(batches) for batches in accumulated] == [4, 4]  # of six: one step of four batches each
    left_out = set(range(48)) - {int(name[:9]) for name in seen}
    later = [list(loader(packed, (1, 0), rank=r, world_size=2, batch_size=5)) for r in range(2)]
    assert left_out != set(range(48)) - {int(name[:9]) for batches in later for name in flat(batches)}


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("start", [1, 4, 5, 11, 12])
def test_a_start_position_goes_on_in_the_same_order(packed, workers, start):
    whole, rest = list(loader(packed, (1, 0), workers)), list(loader(packed, (1, start), workers))
    assert names(rest) == names(whole)[start:]
    assert all(torch.equal(a[0][0], b[0][0]) for a, b in zip(rest, whole[start:], strict=True))


def test_a_resumed_epoch_decodes_nothing_that_is_skipped(packed, monkeypatch):
    rest = loader(packed, (0, 9))
    decoded, original = [], rest.dataset.pipeline.load
    monkeypatch.setattr(rest.dataset.pipeline, "load", lambda data: decoded.append(1) or original(data))
    assert len(list(rest)) == 3 and len(decoded) == 12


def test_loader_processes_that_stay_alive_follow_the_position(packed):
    position = (0, 0)
    shared = loader(packed, workers=2)
    shared.position = lambda length: position
    first = list(shared)
    pids = [worker.pid for worker in shared._iterator._workers]
    position = (1, 5)
    second = list(shared)
    assert pids == [worker.pid for worker in shared._iterator._workers]
    assert names(first) == names(loader(packed, (0, 0), 2)) and names(second) == names(loader(packed, (1, 5), 2))


def test_the_order_is_shuffled_by_seed_and_epoch(packed):
    orders = [flat(loader(packed, (epoch, 0), seed=seed)) for seed in (3, 4) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == flat(loader(packed, (0, 0), seed=3))
    unbuffered = [int(name[:9]) for name in flat(loader(packed, shuffle_buffer=1))]
    assert np.diff(unbuffered).tolist().count(1) >= 48 - 7 and unbuffered != sorted(
        unbuffered
    )  # shards in another order
    assert np.diff([int(name[:9]) for name in orders[0]]).tolist().count(1) < 20


@pytest.mark.parametrize("name", ["pil", "tensor", "device"])
def test_the_crop_is_that_of_the_place_in_the_shards(packed, name):
    pipeline = build_pipeline(name, NEPATransform(24), "NEPA")
    files = {name: data for url in open_shards(str(packed)).urls for name, data, _ in read_shard(url)}
    views, _, filenames = next(iter(loader(packed, (6, 2), pipeline=name)))
    (view,) = pipeline.finish(views, torch.device("cpu"), filenames)
    for image, filename in zip(view, filenames, strict=True):
        key = filename.rsplit("/", 1)[-1]
        data = torch.frombuffer(bytearray(files[key]), dtype=torch.uint8)
        part = pipeline.view(pipeline.load(data), (3, 6, int(key[:9])))
        (expected,) = pipeline.finish(pipeline.collate([(part, 0, key)])[0], torch.device("cpu"), [key])
        assert (image - expected[0]).abs().max() < 1e-5


@pytest.mark.parametrize("source", ["{}/images-{{000000..000006}}.tar", "pipe:cat {}/images-{{000000..000006}}.tar"])
def test_patterns_and_commands(packed, source):
    shards = open_shards(source.format(packed), allow_pipe=True)
    assert shards.counts == [7] * 6 + [6] and shards.classes == ["a", "b"]
    assert shards.fingerprint == open_shards(str(packed)).fingerprint
    assert sorted(flat(loader(source.format(packed), workers=2, allow_pipe=True))) == [
        f"{i:09d}.jpg" for i in range(48)
    ]


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads http by curl")
def test_shards_on_a_web_server(copy, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(copy)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/images-{{000000..000006}}.tar"
        for rank in range(2):  # two ranks of two loader processes: pieces begin and end within a shard
            options = {"position": (1, 2), "workers": 2, "rank": rank, "world_size": 2}
            assert names(loader(url, **options)) == names(loader(copy, **options))
        assert open_shards(url).fingerprint == open_shards(str(copy)).fingerprint
        (copy / "images-000003.tar").unlink()
        with pytest.raises(DataError, match=r"The shard http.*images-000003\.tar cannot be read"):
            list(loader(url))
        with pytest.raises(DataError, match=r"nowhere/index\.json is no index of shards"):
            open_shards(url.replace("/images", "/nowhere/images"))
    finally:
        server.shutdown()
        server.server_close()


def test_labels_and_classes(packed):
    data = ImageData(train_shards=str(packed))
    assert data.num_classes == 2 and data.training_data()["train_images"] == 48
    labels = {name: label for url in open_shards(str(packed)).urls for name, _, label in read_shard(url)}
    for _, batch_labels, filenames in loader(packed, workers=2):
        assert batch_labels.tolist() == [labels[name.rsplit("/", 1)[-1]] for name in filenames]
    assert sum(labels.values()) == 24


# -- errors ------------------------------------------------------------------------------------------------------------


def test_missing_shards(packed, copy, tmp_path):
    (copy / "images-000003.tar").unlink()
    with pytest.raises(DataError, match=r"1 of 7 shard\(s\) are missing, first .*images-000003\.tar"):
        open_shards(f"{copy}/images-{{000000..000006}}.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no \.tar file"):
        open_shards(str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"The shard pipe:cat /nowhere/a\.tar .* cannot be read"):
        list(read_shard("pipe:cat /nowhere/a.tar 2>/dev/null"))


def test_an_index_that_is_missing_or_wrong(copy):
    index = json.loads((copy / "index.json").read_text())

    def rewrite(shards):
        changes = {"shards": shards, "images": sum(shard["images"] for shard in shards)}
        (copy / "index.json").write_text(json.dumps(index | changes))

    rewrite(shards=index["shards"][:-1])
    with pytest.raises(DataError, match=r"does not list .*images-000006\.tar"):
        open_shards(str(copy))
    rewrite(shards=[shard | {"images": 0} for shard in index["shards"]])
    with pytest.raises(DataError, match=r"there is no image in .*images-000000\.tar"):
        open_shards(str(copy))
    rewrite(shards=[shard | {"images": 8} for shard in index["shards"]])
    with pytest.raises(DataError, match="fewer than its index says"):
        list(loader(copy))
    (copy / "index.json").write_text("{}")
    with pytest.raises(DataError, match=r"index\.json is no index of shards"):
        open_shards(str(copy))
    (copy / "index.json").unlink()
    with pytest.raises(DataError, match=r"make_shards\.py --index counts them"):
        open_shards(str(copy))


def test_a_shard_that_is_cut_off(copy):
    whole = (copy / "images-000002.tar").read_bytes()
    (copy / "images-000002.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"images-000002\.tar (cannot be read|holds 3 images)"):
        list(loader(copy))


def test_an_unreadable_image(copy):
    with tarfile.open(copy / "images-000001.tar") as tar:
        member = tar.getmember("000000009.jpg")
    with (copy / "images-000001.tar").open("r+b") as file:
        file.seek(member.offset_data)
        file.write(bytes(member.size))
    with pytest.raises(DataError, match=r"images-000001\.tar/000000009\.jpg cannot be read"):
        list(loader(copy))
    with pytest.warns(UserWarning, match=r"Skipped .*000000009\.jpg"):
        whole = list(loader(copy, (1, 0), on_bad_image="skip"))
    seen = flat(whole)
    assert len(seen) == 48 and len(set(seen)) == 47 and "000000009.jpg" not in seen
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for start in range(1, 12):
            assert names(loader(copy, (1, start), on_bad_image="skip")) == names(whole)[start:]


def test_more_readers_than_shards(packed):
    data = ImageData(train_shards=str(packed), batch_size_per_device=2, num_workers=4)
    data.check_batch(1)
    with pytest.raises(DataError, match=r"7 shard\(s\) are fewer than the 8 processes that read them"):
        data.check_batch(2)
    with pytest.raises(DataError, match="48 images are fewer than one batch of 49"):
        ImageData(train_shards=str(packed), batch_size_per_device=49).check_batch(1)


def test_options_that_contradict_each_other(packed, tmp_path):
    with pytest.raises(DataError, match="both set"):
        ImageData(train_dir=str(packed), train_shards=str(packed))
    with pytest.raises(DataError, match="shuffle_buffer must be at least 1, got 0"):
        ImageData(train_shards=str(packed), shuffle_buffer=0)
    (photo_folder(tmp_path / "val", 4) / "b").rename(tmp_path / "val" / "c")
    with pytest.raises(DataError, match=r"val_dir has other classes than data\.train_shards: b, c only"):
        ImageData(train_shards=str(packed), val_dir=str(tmp_path / "val"))


def test_without_webdataset(packed, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(DataError, match=r"pip install 'nepa-plugin\[shards\]'"):
        open_shards(str(packed))


def test_resuming_with_other_readers_warns(packed, tmp_path):
    options = {"train_shards": str(packed), "batch_size_per_device": 4, "num_workers": 0}
    record(options, callbacks=[LastCheckpoint(tmp_path, 5)], stop_after=6)
    with pytest.warns(UserWarning, match=r"Resumed with data\.num_workers 2 instead of 0: the rest of this epoch"):
        record(options | {"num_workers": 2}, ckpt_path=tmp_path / "last.ckpt")
