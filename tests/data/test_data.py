"""Images in: their order, their augmentation, and the checks of files."""

import random
from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest
import torch
from lightly.data import LightlyDataset
from PIL import Image

import nepa_plugin.data.files
from nepa_plugin.data import (
    DataError,
    EpochBatchSampler,
    ImageData,
    NEPATransform,
    SeededDataset,
    digits_folder,
    eval_transform,
)
from nepa_plugin.data.files import find_bad_images
from nepa_plugin.data.samples import PADDING, EqualShares


def picture(seed=0, size=(40, 48)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(4):
            picture(i).save(tmp_path / "images" / label / f"{i}.png")
    return tmp_path / "images"


# -- order -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [48, 53])
def test_two_ranks_share_the_batches_of_one_process(num_samples):
    single = list(EpochBatchSampler(num_samples, 8, seed=3))
    ranks = [list(EpochBatchSampler(num_samples, 4, seed=3, rank=r, world_size=2)) for r in range(2)]
    assert len(single) == len(ranks[0]) == len(ranks[1]) == 6
    for whole, first, second in zip(single, *ranks, strict=True):
        assert first + second == whole


def test_accumulated_batches_make_whole_steps():
    """The images of every step are those of one that is not accumulated; what fills no step is left out."""
    whole = list(EpochBatchSampler(103, 16, seed=3))
    parts = list(EpochBatchSampler(103, 4, seed=3, accumulate=4))
    assert len(whole) == 6 and [list(chain(*parts[i : i + 4])) for i in range(0, 24, 4)] == whole
    assert len(EpochBatchSampler(103, 2, seed=3, world_size=2, accumulate=4)) == 24


def test_an_epoch_covers_each_index_once():
    sampler = EpochBatchSampler(48, 8, seed=3, position=lambda length: (5, 0))
    keys = [key for batch in sampler for key in batch]
    assert len(sampler) == 6 and {epoch for epoch, _ in keys} == {5}
    assert sorted(index for _, index in keys) == list(range(48))


def test_the_last_incomplete_batch_is_dropped():
    keys = [key for batch in EpochBatchSampler(53, 8, seed=3) for key in batch]
    assert len(keys) == len(set(keys)) == 48


def test_a_start_position_goes_on_in_the_same_order():
    whole = list(EpochBatchSampler(48, 8, seed=3, position=lambda length: (2, 0)))
    for start in range(7):
        rest = EpochBatchSampler(48, 8, seed=3, position=lambda length, start=start: (2, start))
        assert list(rest) == whole[start:]


def test_epochs_and_seeds_differ_and_a_repeat_does_not():
    def indices(seed, epoch):
        sampler = EpochBatchSampler(48, 8, seed=seed, position=lambda length: (epoch, 0))
        return [index for batch in sampler for _, index in batch]

    assert indices(3, 1) == indices(3, 1)
    assert len({tuple(indices(seed, epoch)) for seed in (3, 4) for epoch in (0, 1, 2)}) == 6
    assert indices(3, 1) != list(range(48))


def test_the_position_is_asked_for_with_the_length_at_each_start():
    asked = []

    def position(length):
        asked.append(length)
        return len(asked), 0

    sampler = EpochBatchSampler(48, 8, seed=3, position=position)
    epochs = [next(iter(sampler))[0][0] for _ in range(2)]
    assert epochs == [1, 2] and asked == [6, 6]


@pytest.mark.parametrize(("world_size", "each"), [(1, 8), (2, 4), (3, 3), (5, 2), (11, 1)])
def test_ranks_have_as_many_images_to_validate_and_each_counts_once(world_size, each, folder):
    dataset = SeededDataset(LightlyDataset(str(folder)), np.asarray, seed=3, indices=list(range(8)))
    ranks = [EqualShares(dataset, rank, world_size) for rank in range(world_size)]
    assert [len(rank) for rank in ranks] == [each] * world_size
    samples = [sample for rank in ranks for sample in (rank[i] for i in range(each))]
    scored = sorted((name, label) for _, label, name in samples if label != PADDING)
    assert scored == [(f"{label}/{i}.png", number) for number, label in enumerate("ab") for i in range(4)]


# -- samples -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(folder):
    return SeededDataset(LightlyDataset(str(folder)), NEPATransform(16), seed=7, indices=list(range(8)))


def test_a_view_depends_on_epoch_and_index_only(dataset, folder):
    view, target, filename = dataset[2, 5]
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    for key in ((0, 1), (2, 3)):
        dataset[key]
    again = dataset[2, 5]
    assert torch.equal(view[0], again[0][0]) and (target, filename) == again[1:] == (1, "b/1.png")
    assert not torch.equal(view[0], dataset[3, 5][0][0])
    other = SeededDataset(LightlyDataset(str(folder)), NEPATransform(16), seed=8, indices=list(range(8)))
    assert not torch.equal(view[0], other[2, 5][0][0])


def test_equal_images_get_different_views(dataset):
    """a/1.png and b/1.png have the same pixels."""
    assert not torch.equal(dataset[0, 1][0][0], dataset[0, 5][0][0])


def test_the_global_generators_stay_as_they_were(dataset):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    dataset[1, 2]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    after = np.random.get_state()
    assert before[2][0] == after[0] and np.array_equal(before[2][1], after[1]) and before[2][2:] == after[2:]


def test_the_generators_are_restored_after_an_error(folder):
    def broken(image):
        torch.rand(1)
        raise RuntimeError("broken")

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken"):
        SeededDataset(LightlyDataset(str(folder)), broken, 0, [0])[0, 0]
    assert torch.equal(before, torch.get_rng_state())


def test_a_transform_that_draws_from_python_and_numpy_is_seeded_too(folder):
    def drawing(image):
        return torch.tensor([random.random(), np.random.rand(), torch.rand(1).item()], dtype=torch.float64)

    data = SeededDataset(LightlyDataset(str(folder)), drawing, seed=7, indices=list(range(8)))
    first = data[1, 2][0]
    random.seed(5)
    assert torch.equal(data[1, 2][0], first)
    assert (data[1, 3][0] != first).all()


def test_a_file_that_became_unreadable(dataset, folder):
    (folder / "a" / "1.png").write_text("gone")
    with pytest.raises(DataError, match=r"a/1\.png cannot be read"):
        dataset[0, 1]
    dataset.on_bad_image = "skip"
    with pytest.warns(UserWarning, match=r"Skipped a/1\.png"):
        assert dataset[0, 1][2] == "a/2.png"


# -- transforms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "shape"), [(16, (3, 16, 16)), ((16, 24), (3, 16, 24))])
def test_nepa_transform(size, shape):
    views = NEPATransform(size)(picture())
    assert isinstance(views, list) and len(views) == 1
    assert views[0].shape == shape and views[0].dtype == torch.float32
    assert -1 <= views[0].min() < -0.5 and 0.5 < views[0].max() <= 1


def test_nepa_transform_maps_black_and_white_to_the_ends():
    for value, expected in ((0, -1.0), (255, 1.0)):
        view = NEPATransform(8)(Image.new("RGB", (20, 20), (value,) * 3))[0]
        assert torch.equal(view, torch.full((3, 8, 8), expected))


def test_the_flip_can_be_turned_off_and_forced():
    image = picture(size=(16, 16))
    kept, flipped = (NEPATransform(16, scale=(1, 1), hflip_prob=p).transform.transforms[1](image) for p in (0, 1))
    assert np.array_equal(kept, image) and np.array_equal(flipped, np.asarray(image)[:, ::-1])


@pytest.mark.parametrize(("size", "shape"), [(16, (3, 16, 16)), ((16, 24), (3, 16, 24))])
def test_eval_transform(size, shape):
    transform = eval_transform(size)
    for image in (picture(size=(40, 64)), picture(size=(64, 40))):
        assert transform(image).shape == shape
        assert torch.equal(transform(image), transform(image))
    assert torch.equal(transform(Image.new("RGB", (30, 50))), torch.full(shape, -1.0))


# -- the embedded images -----------------------------------------------------------------------------------------------


def test_digits(tmp_path):
    root = digits_folder(tmp_path / "digits")
    for split, count in (("train", 1400), ("val", 397)):
        assert sorted(p.name for p in (root / split).iterdir()) == [str(i) for i in range(10)]
        files = sorted((root / split).rglob("*.png"))
        assert len(files) == count
        for file in files[::100]:
            with Image.open(file) as image:
                assert image.size == (32, 32) and image.convert("RGB").mode == "RGB"
    assert [p.name for p in tmp_path.iterdir()] == ["digits"]
    stamp = (root / "train").stat().st_mtime_ns
    assert digits_folder(tmp_path / "digits") == root and (root / "train").stat().st_mtime_ns == stamp


# -- checking files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    """Good and bad files, and a count of how often each was opened."""
    root = tmp_path / "mixed"
    root.mkdir()
    picture(1, (64, 64)).save(root / "good.jpg")
    picture(2, (64, 64)).save(root / "good.png")
    whole = (root / "good.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "text.png").write_text("not an image")
    opened, original = Counter(), nepa_plugin.data.files._examine_file

    def counting(path, max_pixels):
        opened[path.rsplit("/", 1)[-1]] += 1
        return original(path, max_pixels)

    monkeypatch.setattr(nepa_plugin.data.files, "_examine_file", counting)
    monkeypatch.setenv("NEPA_PLUGIN_CACHE", str(tmp_path / "cache"))
    return root, opened


FILES = ["good.jpg", "cut.jpg", "good.png", "text.png"]


def test_bad_images_are_found_once(mixed):
    root, opened = mixed
    assert find_bad_images(root, FILES) == ["cut.jpg", "text.png"]
    assert opened == dict.fromkeys(FILES, 1)
    assert find_bad_images(root, FILES) == ["cut.jpg", "text.png"]
    assert opened == dict.fromkeys(FILES, 1)


def test_a_changed_file_is_checked_again(mixed):
    root, opened = mixed
    find_bad_images(root, FILES)
    (root / "cut.jpg").write_bytes((root / "good.jpg").read_bytes())
    assert find_bad_images(root, FILES) == ["text.png"] and opened["cut.jpg"] == 2
    (root / "good.png").write_bytes((root / "good.png").read_bytes()[:200])
    assert find_bad_images(root, FILES) == ["good.png", "text.png"] and opened["good.png"] == 3


def test_another_list_of_files_is_checked_again(mixed):
    root, _ = mixed
    assert find_bad_images(root, FILES[:1]) == []
    assert find_bad_images(root, FILES) == ["cut.jpg", "text.png"]


# -- the data module ---------------------------------------------------------------------------------------------------


def test_val_dir_with_other_classes(folder, tmp_path):
    (tmp_path / "val" / "a").mkdir(parents=True)
    (tmp_path / "val" / "c").mkdir()
    for label in ("a", "c"):
        picture().save(tmp_path / "val" / label / "0.png")
    with pytest.raises(DataError, match=r"val_dir has other classes than data\.train_dir: b, c only in one"):
        ImageData(train_dir=str(folder), val_dir=str(tmp_path / "val"))


def test_number_of_classes(folder):
    assert ImageData(train_dir=str(folder)).num_classes == 2
    assert ImageData(train_dir=str(folder / "a")).num_classes == 0


def test_skipped_files_are_left_out(folder):
    (folder / "a" / "2.png").write_text("not an image")
    with pytest.raises(DataError, match=r"1 file\(s\) cannot be read as images: .*a/2\.png"):
        ImageData(train_dir=str(folder)).check_images()
    data = ImageData(train_dir=str(folder), on_bad_image="skip")
    assert data.check_images() == 1
    dataset = data._dataset(data.train_images, NEPATransform(8))
    assert [dataset[0, i][2] for i in islice(range(len(dataset)), 3)] == ["a/0.png", "a/1.png", "a/3.png"]
