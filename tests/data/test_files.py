"""Image folders as they are found: links, pipes, permissions, sizes, and what is left out."""

import hashlib
import json
import os
import shutil
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from nepa_plugin.data import (
    DataError,
    ImageData,
    NEPATransform,
    check_files,
    content_fingerprint,
    eval_transform,
    files,
    find_bad_images,
    fingerprint,
    image_folder,
)
from nepa_plugin.data.cache import private_folder
from nepa_plugin.data.files import files_signature
from nepa_plugin.data.pipelines import FileDataset, build_pipeline
from nepa_plugin.data.samples import SeededDataset


def picture(seed=0, size=(16, 12)):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two classes of three images."""
    monkeypatch.setenv("NEPA_PLUGIN_CACHE", str(tmp_path / "cache"))
    for i in range(6):
        (tmp_path / "images" / "ab"[i // 3]).mkdir(parents=True, exist_ok=True)
        picture(i).save(tmp_path / "images" / "ab"[i // 3] / f"{i}.png")
    return tmp_path / "images"


def said(caplog):
    return [record.getMessage() for record in caplog.records]


# -- what is an image, and what is left out ----------------------------------------------------------------------------


def test_extensions_count_in_capitals_too_and_what_is_left_out_is_counted(folder, caplog):
    (folder / "a" / "0.png").rename(folder / "a" / "0.PNG")
    picture().save(folder / "b" / "x.JPeG", "JPEG")
    picture().save(folder / "b" / "x.gif")
    (folder / "b" / "notes.TXT").write_text("")
    (folder / "README").write_text("")
    picture().save(folder / "beside.png")
    with caplog.at_level("INFO"):
        images = image_folder(folder, "data.train_dir")
    assert len(images) == 7
    assert said(caplog) == [
        f"data.train_dir: 7 images in {folder}; left out 4 other file(s): 1 image(s) that are in no sub-folder, "
        "1 .gif, 1 .txt, 1 without extension."
    ]


def test_where_nothing_is_left_out_nothing_is_said(folder, caplog):
    with caplog.at_level("INFO"):
        assert len(image_folder(folder)) == 6
    assert said(caplog) == []


def test_a_video_beside_the_images_is_named(folder):
    (folder / "a" / "film.mp4").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds 1 video\(s\), which lightly reads instead of images\. Move them away"):
        image_folder(folder)


# -- links, pipes, permissions -----------------------------------------------------------------------------------------


def test_a_link_to_a_folder_above_is_refused(folder):
    (folder / "a" / "again").symlink_to("..", target_is_directory=True)
    with pytest.raises(DataError, match=r"a/again is a link to a folder that it is in\. Remove the link"):
        image_folder(folder)


def test_a_way_round_two_links_is_refused(folder):
    (folder / "a" / "to_b").symlink_to("../b", target_is_directory=True)
    (folder / "b" / "to_a").symlink_to("../a", target_is_directory=True)
    start = time.monotonic()
    with pytest.raises(DataError, match="is a link to a folder that it is in"):
        image_folder(folder)
    assert time.monotonic() - start < 5


def test_links_to_other_folders_are_followed(folder, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "c").symlink_to(folder / "a", target_is_directory=True)
    (tmp_path / "linked" / "d").symlink_to(folder / "b", target_is_directory=True)
    assert len(image_folder(tmp_path / "linked")) == 6


def test_what_is_no_file_is_a_bad_image_with_its_reason(folder):
    os.mkfifo(folder / "a" / "pipe.png")
    (folder / "a" / "dead.png").symlink_to("nowhere")
    (folder / "a" / "self.png").symlink_to("self.png")
    (folder / "a" / "empty.png").write_bytes(b"")
    data = ImageData(train_dir=str(folder), batch_size_per_device=2)
    with pytest.raises(DataError) as error:
        data.check_images()
    a = folder / "a"
    assert str(error.value) == (
        f"4 file(s) cannot be read as images: {a}/dead.png (a link to nothing), {a}/empty.png (damaged), "
        f"{a}/pipe.png (no regular file), {a}/self.png (damaged). Remove or repair them, or pass --data.on_bad_image "
        "skip."
    )
    data = ImageData(train_dir=str(folder), batch_size_per_device=2, on_bad_image="skip")
    assert data.check_images() == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_without_permission_is_named(folder):
    (folder / "b").chmod(0)
    try:
        with pytest.raises(DataError, match=r"the folder .*/b cannot be read: Permission denied"):
            image_folder(folder)
    finally:
        (folder / "b").chmod(0o755)


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    original = os.scandir

    def scandir(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"the folder .*/b cannot be read: Permission denied"):
        image_folder(folder)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "file", "dead"])
def test_what_is_no_folder(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "dead").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"no folder at|is a file, no folder"):
        image_folder(f"{tmp_path}/{name}")


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def huge(folder):
    """An image of 195 megapixels, in 0.2 MB."""
    Image.new("1", (15_000, 13_000)).save(folder / "a" / "huge.png")
    return folder


def test_the_most_pixels_are_an_option(huge):
    data = ImageData(train_dir=str(huge), batch_size_per_device=2)
    with pytest.raises(DataError, match=r"huge\.png \(195,000,000 pixels, more than max_image_pixels 178,956,970\)"):
        data.check_images()
    assert ImageData(train_dir=str(huge), batch_size_per_device=2, max_image_pixels=200_000_000).check_images() == 0
    small = ImageData(train_dir=str(huge), batch_size_per_device=2, max_image_pixels=191, on_bad_image="skip")
    with pytest.raises(DataError, match="holds no readable image"):
        small.check_images()


def test_an_image_of_195_megapixels_is_read_if_it_may_be(huge):
    images = image_folder(huge, max_pixels=200_000_000)
    (index,) = [i for i, name in enumerate(images.get_filenames()) if name == "a/huge.png"]
    sample = SeededDataset(images, lambda image: image.crop((0, 0, *image.size)).size, 0, [index])[0]
    assert sample[0] == (15_000, 13_000)
    with pytest.raises(DataError, match=r"huge\.png cannot be read: .*decompression bomb"):
        SeededDataset(image_folder(huge), lambda image: image, 0, [index])[0]
    assert Image.MAX_IMAGE_PIXELS == 89_478_485


@pytest.mark.parametrize("name", ["pil", "tensor", "device"])
def test_shards_have_the_same_bound(folder, name):
    from nepa_plugin.data.packing import make_shards
    from nepa_plugin.data.shards import ShardDataset, open_shards

    for i in range(6):
        picture(i, (64, 64)).save(folder / "ab"[i // 3] / f"{i}.jpg")
        (folder / "ab"[i // 3] / f"{i}.png").unlink()
    make_shards(folder, folder.parent / "shards", 3)
    pipeline = build_pipeline(name, NEPATransform(16), "NEPA")
    shards = open_shards(str(folder.parent / "shards"))
    assert len(list(ShardDataset(shards, pipeline, 2, 0, max_pixels=4096))) == 6
    with pytest.raises(DataError, match=r"\.jpg cannot be read: .*(4096|bomb)"):
        list(ShardDataset(shards, pipeline, 2, 0, max_pixels=4094))


# -- the same images ---------------------------------------------------------------------------------------------------


def test_fingerprints_of_copies_and_of_other_images(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    images, copy = image_folder(folder), image_folder(tmp_path / "copy")
    assert content_fingerprint(images) == content_fingerprint(copy) and fingerprint(images) == fingerprint(copy)
    for i in range(3):  # BMP files of one size are equally long
        (folder / "a" / f"{i}.png").unlink()
        picture(i).save(folder / "a" / f"{i}.bmp")
    shutil.copytree(folder, tmp_path / "other")
    picture(9).save(tmp_path / "other" / "a" / "1.bmp")
    images, other = image_folder(folder), image_folder(tmp_path / "other")
    assert fingerprint(images) == fingerprint(other) and content_fingerprint(images) != content_fingerprint(other)


def test_a_signature_says_size_and_time_of_every_file_in_order(folder):
    """A hash of (name, size, time) of all, -1 and 0 where a file is gone: records of earlier checks stay valid."""
    names = [f"{'ab'[i // 3]}/{i}.png" for i in (4, 0, 5)] + ["a/gone.png"]
    stats = [(name, (folder / name).stat()) for name in names[:3]]
    whole = [(name, info.st_size, info.st_mtime_ns) for name, info in stats] + [("a/gone.png", -1, 0)]
    assert files_signature(folder, names) == hashlib.sha256(repr(whole).encode()).hexdigest()
    sizes = [info[:2] for info in whole]
    assert files_signature(folder, names, times=False) == hashlib.sha256(repr(sizes).encode()).hexdigest()


@pytest.mark.parametrize("number", [0, 1, 63, 5000])
def test_threads_give_results_in_order_and_many_items_to_a_task(number, monkeypatch):
    tasks = []

    class Pool(ThreadPoolExecutor):
        def submit(self, *args):
            tasks.append(args)
            return super().submit(*args)

    monkeypatch.setattr(files, "ThreadPoolExecutor", Pool)
    assert files.in_threads(lambda x: x * x, range(number)) == [x * x for x in range(number)]
    assert len(tasks) <= max(300, number / 60)  # eight for each of at most 32 threads, then 64 items in each


def test_an_error_in_a_thread_is_raised():
    with pytest.raises(ZeroDivisionError):
        files.in_threads(lambda x: 1 // x, [3, 2, 1, 0, 4])


# -- the record of a check ---------------------------------------------------------------------------------------------


def test_a_damaged_record_is_made_anew(folder, tmp_path):
    files = ["a/0.png", "b/3.png"]
    check = check_files(folder, files)
    (record,) = (tmp_path / "cache" / "checked").iterdir()
    whole = record.read_text()
    for text in ("{", "[]", json.dumps(json.loads(whole) | {"bad": ["a/0.png"]}), "\xff"):
        record.write_bytes(text.encode("latin-1"))
        assert check_files(folder, files) == check and record.read_text() == whole


def test_a_cache_that_cannot_be_written_stops_nothing(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEPA_PLUGIN_CACHE", str(tmp_path / "file" / "cache"))
    assert find_bad_images(folder, ["a/0.png"]) == []


def test_the_cache_is_the_users_alone(folder, tmp_path):
    find_bad_images(folder, ["a/0.png"])
    assert [(tmp_path / "cache" / sub).stat().st_mode & 0o777 for sub in ("", "checked")] == [0o700, 0o700]
    (tmp_path / "shared").mkdir(mode=0o755)
    private_folder(tmp_path / "shared" / "x")
    assert [(tmp_path / sub).stat().st_mode & 0o777 for sub in ("shared", "shared/x")] == [0o755, 0o700]


def test_warnings_of_others_are_heard_after_a_check(folder):
    """Each thread setting the filters, and setting them back, would leave them as they were in the midst of it."""
    before = list(warnings.filters)
    for i in range(5):
        check_files(folder, [f"{'ab'[i // 3]}/{i}.png" for i in range(6)], 1000 + i)
    assert warnings.filters == before


# -- EXIF --------------------------------------------------------------------------------------------------------------


def test_exif_orientation_is_ignored_in_pretraining_and_evaluation(tmp_path):
    """As lightly and torchvision do: the pixels are used as they are stored."""
    plain = Image.fromarray(np.repeat(np.arange(0, 256, 8, dtype=np.uint8)[None], 32, 0)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    (tmp_path / "x").mkdir()
    plain.save(tmp_path / "x" / "0.jpg", quality=95)
    plain.save(tmp_path / "x" / "1.jpg", quality=95, exif=exif)
    images = image_folder(tmp_path / "x")
    evaluation = SeededDataset(images, eval_transform(32, 1.0), 0, [0, 1])
    assert torch.equal(evaluation[0][0], evaluation[1][0])
    transform = NEPATransform(32, scale=(1.0, 1.0), hflip_prob=0)
    for name in ("pil", "tensor"):
        pipeline = build_pipeline(name, transform, "NEPA")
        one, other = (FileDataset(images, pipeline, 0, [i])[0][0][0] for i in (0, 1))
        assert torch.equal(one, other) and one.float().std(dim=-1).mean() > 0.1 > one.float().std(dim=-2).mean()
