"""What shards may come from: nothing is run, expanded or unpacked that the user did not ask for."""

import io
import json
import os
import tarfile
import time

import pytest
from photos import photo_folder

from nepa_plugin.data import DataError, ImageData
from nepa_plugin.data.packing import index_shards, make_shards
from nepa_plugin.data.shards import MAX_FILE_BYTES, open_shards, read_shard
from nepa_plugin.data.sources import beside, shard_name, shard_urls


@pytest.fixture
def there(tmp_path, monkeypatch):
    """An empty working directory, in which a command would leave the file `ran`."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    make_shards(photo_folder(root / "images", 6), root / "shards", images_per_shard=3)
    return root / "shards"


def rename(packed, target):
    target.mkdir(parents=True)
    for path in packed.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def test_a_folder_whose_name_is_a_command_is_a_folder(there, packed):
    rename(packed, there / "pipe:touch ran;#")
    shards = open_shards("pipe:touch ran;#")
    assert shards.urls == [f"{there}/pipe:touch ran;#/images-00000{i}.tar" for i in range(2)]
    assert [len(list(read_shard(url))) for url in shards.urls] == [3, 3]
    assert len(open_shards("pipe:touch ran;#/images-000000.tar")) == 3
    assert not (there / "ran").exists()


@pytest.mark.parametrize(
    "source", ["pipe:touch ran", "x.tar::pipe:touch ran", "{pipe:,}touch ran", "pi{p,q}e:touch ran #{0..1}.tar"]
)
def test_commands_run_only_when_asked_for(there, source):
    (there / "x.tar").write_bytes(b"")
    for run in (open_shards, lambda given: index_shards(given, "index.json")):
        with pytest.raises(DataError, match=r"touch ran.* is a shell command. --data.allow_pipe true runs it"):
            run(source)
    with pytest.raises(DataError, match="is a shell command"):
        ImageData(train_shards=source)
    assert not (there / "ran").exists() and not (there / "index.json").exists()


def test_a_command_that_is_asked_for_is_run(there):
    with pytest.raises(DataError, match="is no index of shards"):
        open_shards("pipe:touch ran", allow_pipe=True)
    assert (there / "ran").exists()


def test_names_in_an_index_are_not_opened(there, packed):
    rename(packed, there / "shards")
    index = json.loads((there / "shards" / "index.json").read_text())
    index["shards"].append({"name": "pipe:touch ran", "images": 5})
    index["images"] += 5
    (there / "shards" / "index.json").write_text(json.dumps(index))
    assert len(open_shards("shards")) == 6 and not (there / "ran").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3://bucket/x.tar", r"only http, https, gs://HOST/\.\.\. are read\. For others"),
        ("file:///x.tar", "is no file, and of the addresses only"),
        ("http:x.tar", "is no file, and of the addresses only"),
        ("ftp://host/x.tar", "is no file, and of the addresses only"),
        ("x-{0..99999999999}.tar", r"x-\{0\.\.99999999999\}\.tar stands for more than 1,000,000 shards"),
        ("x-{0..999}{0..999}{0..9}.tar", "stands for more than 1,000,000 shards"),
        ("{a{0..9999}{0..9999},b}.tar", "stands for more than 1,000,000 shards"),
        ("{a..z}{a..z}{a..z}{a..z}{a..z}.tar", "stands for more than 1,000,000 shards"),
        ("x-{%s..1}.tar" % ("9" * 50), "stands for more than 1,000,000 shards"),
        ("x-{0..1.tar", r"the braces of x-\{0\.\.1\.tar are no pattern: "),
        ("x-{0..1}.tar", r"2 of 2 shard\(s\) are missing, first .*x-0\.tar"),
        ("", "give a folder of .tar files"),
        ("x\0.tar", "give a folder of .tar files"),
    ],
)
def test_sources_that_are_refused(there, source, message):
    start = time.monotonic()
    with pytest.raises(DataError, match=message):
        shard_urls(source)
    assert time.monotonic() - start < 5


def test_what_is_no_file_is_missing(there):
    os.mkfifo("a.tar")
    (there / "b.tar").symlink_to("nowhere")
    (there / "c.tar").mkdir()
    for name in ("a.tar", "b.tar", "{a,b}.tar"):
        with pytest.raises(DataError, match="are missing"):
            shard_urls(name)
    with pytest.raises(DataError, match=r"3 of 3 shard\(s\) are missing"):
        shard_urls(".")


def test_two_shards_of_one_name(there):
    for folder in ("a", "b"):
        (there / folder).mkdir()
        (there / folder / "0.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"two shards are called 0\.tar"):
        shard_urls("{a,b}/0.tar")


def test_names_and_what_is_beside():
    assert shard_name("/data/x.tar.d/my images-0.tar") == "my images-0.tar"
    assert beside("/data/x.tar.d/my images-0.tar", "index.json") == "/data/x.tar.d/index.json"
    assert shard_name("https://h/d/0.tar?key=a/b.tar") == "0.tar"
    assert beside("https://h/d/0.tar?key=1", "index.json") == "https://h/d/index.json?key=1"
    assert beside("pipe:cat /d/0.tar 2>/dev/null", "index.json") == "pipe:cat /d/index.json 2>/dev/null"


# -- what a shard and its index claim ----------------------------------------------------------------------------------


def write_index(folder, **changes):
    index = {"shards": [{"name": "0.tar", "images": 1}], "images": 1, "classes": []} | changes
    (folder / "index.json").write_text(json.dumps(index))


def test_a_sparse_file_of_20_gb_is_refused(there):
    # GNU's format, by hand, as the library writes none: 20 GB of which one block of 512 bytes is stored
    with tarfile.open("0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        member = tarfile.TarInfo("0.png")
        member.type, member.size = tarfile.GNUTYPE_SPARSE, 512
        header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
        header[386:410] = b"%011o\0%011o\0" % (0, 512)
        header[483:495] = tarfile.itn(20 * 10**9, 12, tarfile.GNU_FORMAT)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        tar.fileobj.write(bytes(header) + bytes(512))
        tar.offset += 1024
    with tarfile.open("0.tar") as tar:
        assert [(m.size, m.issparse()) for m in tar] == [(20 * 10**9, True)]
    with pytest.raises(DataError, match=r"0\.tar cannot be read: 0\.png in it claims 20,000,000,000 bytes"):
        list(read_shard(shard_urls("0.tar")[0]))


def test_a_file_that_claims_more_than_an_image_has(there):
    member = tarfile.TarInfo("0.png")
    member.size = MAX_FILE_BYTES + 1
    (there / "0.tar").write_bytes(member.tobuf() + bytes(1024))
    with pytest.raises(DataError, match=r"0\.png in it claims 1,073,741,825 bytes"):
        list(read_shard(shard_urls("0.tar")[0]))


def test_a_class_that_the_index_does_not_name(there):
    with tarfile.open("0.tar", "w") as tar:
        for name, data in (("0.png", b"x"), ("0.cls", b"7")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    write_index(there, classes=["a", "b"])
    from nepa_plugin.data.shards import ShardDataset

    dataset = ShardDataset(open_shards("."), None, 1, 0)
    with pytest.raises(DataError, match=r"0\.tar/0\.png is of class 7, but its index names 2"):
        list(dataset._read(0, 0, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": [{"name": "0.tar", "images": 1}] * 2}, r"it lists 0\.tar twice"),
        ({"images": 7}, "it counts 7 images, but 1 in its shards"),
        ({"shards": [{"name": "0.tar", "images": -3}]}, r"it counts -3 images in 0\.tar"),
        ({"shards": [{"name": "0.tar", "images": 1.5}]}, r"\{.*is no shard with a name and a number of images"),
        ({"shards": [{"name": "0.tar", "images": True}]}, r"\{.*is no shard with a name and a number of images"),
        ({"shards": {"0.tar": 1}}, "it has no list of shards"),
        ({"shards": ["0.tar"]}, "'0.tar' is no shard with a name"),
        ({"classes": "ab"}, "its classes are no list of names"),
        ({"classes": ["a", "a"]}, "it names a class twice"),
    ],
)
def test_an_index_that_counts_wrong(there, changes, message):
    (there / "0.tar").write_bytes(b"")
    write_index(there, **changes)
    with pytest.raises(DataError, match=rf"index\.json is no index of shards \({message}"):
        open_shards(".")


def test_an_index_that_is_no_file_or_nested_without_end(there):
    (there / "0.tar").write_bytes(b"")
    (there / "index.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"index\.json is no index of shards"):
        open_shards(".")
    (there / "index.json").unlink()
    os.mkfifo("index.json")
    with pytest.raises(DataError, match=r"index\.json is no index of shards \(is no regular file\)"):
        open_shards(".")
