import numpy as np
import pytest

pytest.importorskip("mmseg")
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS
from PIL import Image

from nepa_plugin.segmentation import ADE20K, CamVid, DatasetError, DigitScenes, SegmentationFolder
from nepa_plugin.segmentation.datasets import label_map_of
from nepa_plugin.segmentation.scenes import digit_scenes

PREFIX = {"img_path": "images/training", "seg_map_path": "annotations/training"}
PIPELINE = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}, {"type": "PackSegInputs"}]


@pytest.fixture(autouse=True)
def scope():
    init_default_scope("mmseg")


@pytest.fixture
def scenes(tmp_path):
    return digit_scenes(tmp_path / "scenes", num_training=4, num_validation=1)


def build(root, cls=DigitScenes, **kwargs):
    return cls(data_root=str(root), data_prefix=dict(PREFIX), pipeline=PIPELINE, **kwargs)


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def test_labels_become_class_indices(scenes):
    dataset = build(scenes)
    assert len(dataset) == 4 and dataset.metainfo["classes"][1] == "digit 0"
    stored = np.asarray(Image.open(scenes / "annotations/training/0002.png")).astype(int)
    found = dataset[2]["data_samples"].gt_sem_seg.data[0].numpy()
    np.testing.assert_array_equal(found, np.where(stored == 0, 255, stored - 1))


def test_registered_under_their_names():
    for name in ("ADE20K", "CamVid", "DigitScenes", "SegmentationFolder"):
        assert DATASETS.get(name).__name__ == name
    assert len(ADE20K.METAINFO["classes"]) == len(ADE20K.METAINFO["palette"]) == 150
    assert len(CamVid.METAINFO["classes"]) == len(CamVid.METAINFO["palette"]) == 11
    assert len(DigitScenes.METAINFO["classes"]) == len(DigitScenes.METAINFO["palette"]) == 11


@pytest.mark.parametrize(
    ("cls", "help_"), [(ADE20K, "ADEChallengeData2016.zip"), (CamVid, "CAMVID"), (DigitScenes, "make_digit_scenes.py")]
)
def test_a_missing_folder_says_how_to_get_the_data(cls, help_, tmp_path):
    with pytest.raises(DatasetError, match=rf"no folder at .*images/training.*{help_}"):
        build(tmp_path / "nothing", cls)


def test_an_empty_folder(scenes):
    with pytest.raises(DatasetError, match=r"no \*\.jpg in .*images/training"):
        build(scenes, ADE20K)


def test_a_missing_label_map_is_named(scenes):
    (scenes / "annotations/training/0001.png").unlink()
    with pytest.raises(DatasetError, match=r"1 of 4 images have no label map, first: .*annotations/training/0001\.png"):
        build(scenes)


def test_a_damaged_label_map_is_named(scenes):
    (scenes / "annotations/training/0001.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"Cannot read the label map .*0001\.png"):
        build(scenes)


def test_a_label_map_in_colours_is_refused(scenes):
    write(scenes / "annotations/training/0001.png", np.zeros((32, 64, 3)))
    with pytest.raises(DatasetError, match=r"0001\.png is not an 8-bit map of class indices"):
        build(scenes)


def test_a_label_map_of_another_size_is_named(scenes):
    write(scenes / "annotations/training/0003.png", np.ones((64, 96)))
    with pytest.raises(DatasetError, match=r"0003\.png is \(96, 64\) pixels, its image \(64, 32\)"):
        build(scenes)


def test_reduce_zero_label_on_wrong(scenes, tmp_path):
    with pytest.raises(DatasetError, match="set reduce_zero_label=True or leave it out"):
        build(scenes, reduce_zero_label=False)
    with pytest.raises(DatasetError, match="label 0 is the first class; set reduce_zero_label=False"):
        build(tmp_path, CamVid, reduce_zero_label=True)
    pipeline = [dict(PIPELINE[1], reduce_zero_label=False)]
    with pytest.raises(DatasetError, match="pipeline's LoadAnnotations has reduce_zero_label=False"):
        DigitScenes(data_root=str(scenes), data_prefix=dict(PREFIX), pipeline=pipeline)


@pytest.fixture
def own(tmp_path):
    """A user's folder with two classes, 0 and 1."""
    write(tmp_path / "images/training/a.jpg", np.zeros((8, 8, 3)))
    write(tmp_path / "annotations/training/a.png", np.eye(8))
    return tmp_path


def test_own_data(own):
    dataset = build(own, SegmentationFolder, metainfo={"classes": ("sky", "road")})
    np.testing.assert_array_equal(dataset[0]["data_samples"].gt_sem_seg.data[0], np.eye(8))
    with pytest.raises(DatasetError, match=r"give metainfo=dict\(classes"):
        build(own, SegmentationFolder)


def test_a_label_that_is_no_class(own):
    message = r"a\.png has label 1; 1 classes with reduce_zero_label=False are labels 0 to 0"
    with pytest.raises(DatasetError, match=message):
        build(own, SegmentationFolder, metainfo={"classes": ("sky",)})


def test_labels_from_zero_with_reduce_zero_label_are_pointed_out(own, monkeypatch):
    import nepa_plugin.segmentation.datasets as module

    said = []
    monkeypatch.setattr(module, "print_log", lambda text, **kwargs: said.append(text))
    build(own, SegmentationFolder, metainfo={"classes": ("sky", "road")}, reduce_zero_label=True)
    assert len(said) == 1 and "no label 2 (road)" in said[0] and "must be False" in said[0]


def test_the_label_map_of_an_image(scenes):
    image = scenes / "images/training/0001.png"
    assert label_map_of(image) == scenes / "annotations/training/0001.png"
    (scenes / "annotations/training/0001.png").unlink()
    assert label_map_of(image) is None
    assert label_map_of("/somewhere/else.jpg") is None
