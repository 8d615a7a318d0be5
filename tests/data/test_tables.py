"""Tables of Hugging Face's ``datasets``: the same batches as from the folder they were made of, in each layout."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recorder import record

import nepa_plugin
from nepa_plugin.data import DataError, ImageData, digits_folder, evaluation_images, image_folder
from nepa_plugin.data.files import content_fingerprint, fingerprint
from nepa_plugin.data.native import native_sizes
from nepa_plugin.data.tables import open_images, table_splits
from nepa_plugin.evaluation import evaluate
from nepa_plugin.training.callbacks import LastCheckpoint

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

FEATURES = datasets.Features(
    {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(10)])}
)


def table_of(images, features=FEATURES):
    """A table of the image files of a folder, in its order."""
    rows = [(Path(path).read_bytes(), Path(path).name, label) for path, label in images.dataset.samples]
    cells = [{"bytes": data, "path": name} for data, name, _ in rows]
    return datasets.Dataset.from_dict({"image": cells, "label": [label for *_, label in rows]}, features=features)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The digits' folder, six images of each class and split."""
    root = tmp_path_factory.mktemp("few")
    for split in ("train", "val"):
        for number in range(10):
            files = sorted((digits_folder() / split / str(number)).iterdir())[:6]
            (root / split / str(number)).mkdir(parents=True)
            for file in files:
                (root / split / str(number) / file.name).write_bytes(file.read_bytes())
    return root


@pytest.fixture(scope="module")
def tables(few, tmp_path_factory):
    """Layout -> folder with a table of the same images."""
    root = tmp_path_factory.mktemp("tables")
    train, val = (table_of(image_folder(few / split)) for split in ("train", "val"))
    datasets.DatasetDict({"train": train, "validation": val}).save_to_disk(
        root / "saved", num_shards={"train": 3, "validation": 1}
    )
    for layout, folder in (("parquet", root / "parquet" / "data"), ("hub cache", root / "cache")):
        folder.mkdir(parents=True)
        for split, table in (("train", train), ("validation", val)):
            for part in range(2):
                shard = table.shard(2, part, contiguous=True)
                if layout == "parquet":
                    shard.to_parquet(folder / f"{split}-{part:05d}-of-00002.parquet")
                else:
                    shard.save_to_disk(root / "part")
                    (file,) = (root / "part").glob("*.arrow")
                    file.rename(folder / f"digits-{split}-{part:05d}-of-00002.arrow")
    return {"saved": root / "saved", "parquet": root / "parquet", "hub cache": root / "cache"}


@pytest.mark.parametrize("layout", ["saved", "parquet", "hub cache"])
def test_a_table_and_the_folder_hold_the_same(layout, few, tables):
    for split, wanted in (("train", ("train",)), ("val", ("validation", "val"))):
        folder, table = image_folder(few / split), open_images(tables[layout], split=wanted)
        assert len(table) == len(folder) == 60
        assert table.dataset.classes == folder.dataset.classes and table.dataset.targets == folder.dataset.targets
        for index in (0, 17, 59):
            (image, label, name), (other, other_label, file) = table[index], folder[index]
            assert np.array_equal(np.asarray(image), np.asarray(other)) and label == other_label
            assert name == f"row {index} ({Path(file).name})"
        assert table.check().bad == {}


@pytest.mark.parametrize("pipeline", ["pil", "tensor", "device"])
def test_training_and_validation_batches_are_those_of_the_folder(pipeline, few, tables):
    options = {"batch_size_per_device": 16, "seed": 3, "pipeline": pipeline}
    folder = record({"train_dir": str(few / "train"), "val_dir": str(few / "val"), **options})
    table = record({"train_dir": str(tables["saved"]), "val_dir": str(tables["saved"]), **options})
    assert len(folder.batches) == len(table.batches) == 2 * 3
    assert [batch[1:] for batch in folder.batches] == [batch[1:] for batch in table.batches]
    assert all(torch.equal(one, other) for one, other in zip(folder.val_images, table.val_images, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_goes_on_where_it_was(workers, tables, tmp_path):
    options = {"train_dir": str(tables["parquet"]), "batch_size_per_device": 16, "num_workers": workers}
    whole = record(options)
    callback = {"callbacks": [LastCheckpoint(tmp_path, every_n_steps=1)]}
    first = record(options, stop_after=4, **callback)
    rest = record(options, ckpt_path=tmp_path / "last.ckpt")
    assert len(first.batches) == 4 and first.batches + rest.batches == whole.batches


def test_a_backbone_is_evaluated_on_a_table_as_on_the_folder(few, tables, tmp_path):
    import timm

    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    nepa_plugin.save_backbone(timm.create_model("nepa_vit_tiny_patch14_224", **args), tmp_path / "backbone")
    scores = []
    for name, data in (("folder", few), ("table", tables["saved"])):
        results = evaluate(tmp_path / "backbone", str(data), ["knn", "linear"], out=tmp_path / name)
        scores.append({protocol: result["top1"] for protocol, result in results["protocols"].items()})
    assert scores[0] == scores[1] and scores[0]["linear"] > 15


def test_records_of_a_table_tell_other_images(few, tables, tmp_path):
    train = open_images(tables["saved"])
    assert fingerprint(train) == fingerprint(open_images(tables["saved"] / "train"))
    assert content_fingerprint(train) == content_fingerprint(open_images(tables["parquet"]))
    other = table_of(image_folder(few / "val"))
    other.save_to_disk(tmp_path / "other")
    assert content_fingerprint(train) != content_fingerprint(open_images(tmp_path / "other"))


def test_unreadable_rows_are_named_before_training_or_left_out(few, tmp_path):
    table = table_of(image_folder(few / "train"))
    good = table[0]["image"]
    buffer = io.BytesIO()
    good.save(buffer, "PNG")
    cells = [{"bytes": buffer.getvalue()[:60], "path": "cut.png"}, None]
    cells += [{"bytes": buffer.getvalue(), "path": None}] * 10
    broken = datasets.Dataset.from_dict({"image": cells, "label": [0, 1] * 6}, features=FEATURES)
    broken.save_to_disk(tmp_path)
    data = ImageData(str(tmp_path), batch_size_per_device=4)
    with pytest.raises(DataError, match=r"2 file\(s\) cannot be read as images: .*row 0 \(cut.png\) \(damaged\)"):
        data.check_images()
    assert ImageData(str(tmp_path), on_bad_image="skip").check_images() == 2
    run = record({"train_dir": str(tmp_path), "batch_size_per_device": 5, "on_bad_image": "skip"}, epochs=1)
    assert sorted(name for batch in run.batches for name in batch[0]) == sorted(f"row {i}" for i in range(2, 12))


def test_a_table_without_labels_or_with_numbers_alone(few, tmp_path):
    rows = [Path(path).read_bytes() for path, _ in image_folder(few / "train").dataset.samples[::6]]
    cells = [{"bytes": data, "path": None} for data in rows]
    plain = datasets.Features({"img": datasets.Image()})
    datasets.Dataset.from_dict({"img": cells}, features=plain).save_to_disk(tmp_path / "none")
    assert ImageData(str(tmp_path / "none")).num_classes == 0
    hidden = datasets.Dataset.from_dict({"image": cells, "label": [-1] * 10}, features=FEATURES)
    hidden.save_to_disk(tmp_path / "hidden")
    assert ImageData(str(tmp_path / "hidden")).num_classes == 0
    numbers = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 2, 1, 0] * 2}, features=numbers)
    table.save_to_disk(tmp_path / "numbers")
    assert ImageData(str(tmp_path / "numbers")).classes == ["0", "1", "2"]


def test_parquet_of_another_hand_with_paths_in_place_of_images(few, tmp_path):
    files = [path for path, _ in image_folder(few / "train").dataset.samples[:3]]
    gone = [{"bytes": None, "path": path} for path in [*files, str(tmp_path / "gone.png")]]
    parquet.write_table(pyarrow.table({"picture": gone, "label": [0, 1, 1, 0]}), tmp_path / "all.parquet")
    table = open_images(tmp_path)
    assert table.dataset.targets == [0, 1, 1, 0] and table.dataset.classes == ["0", "1"]
    assert np.array_equal(np.asarray(table[1][0]), np.asarray(Image.open(files[1]).convert("RGB")))
    assert table.check().bad == {"row 3 (gone.png)": "not there"}


def test_images_of_their_own_sizes_are_those_of_the_folder(few, tables):
    folder, table = image_folder(few / "train"), open_images(tables["parquet"])
    sizes = [native_sizes(images, range(3, 60), (4, 4), 36, None, 2).counts for images in (folder, table)]
    assert sizes[0] == sizes[1] == {(24, 24): 57}


def test_what_is_no_table_of_images_is_one_clear_error(few, tables, tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    with pytest.raises(DataError, match=r"data.train_dir: .*text has no column of images, only text"):
        ImageData(str(tmp_path / "text"))
    with pytest.raises(DataError, match=r"this table needs the splits train and validation, but has none"):
        evaluation_images(tmp_path / "text")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match=r"data.train_dir: .*broken cannot be read as a table of images"):
        ImageData(str(tmp_path / "broken"))
    with pytest.raises(DataError, match=r"data.val_dir: .*broken has no split validation or val or test, only train"):
        ImageData(str(tables["saved"]), str(tmp_path / "broken"))
    assert table_splits(few) == {} and table_splits(tmp_path / "nothing") == {}
