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
    for image in (scenes / "images/training").iterdir():
        image.unlink()
    with pytest.raises(DatasetError, match=r"no \*\.jpg, .*\*\.webp in .*images/training"):
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
    assert len(said) == 1 and "never hold road" in said[0] and "No label is 2: if labels count from 0" in said[0]


def test_the_label_map_of_an_image(scenes):
    image = scenes / "images/training/0001.png"
    assert label_map_of(image) == scenes / "annotations/training/0001.png"
    (scenes / "annotations/training/0001.png").unlink()
    assert label_map_of(image) is None
    assert label_map_of("/somewhere/else.jpg") is None


@pytest.fixture
def said(monkeypatch):
    import nepa_plugin.segmentation.datasets as module

    texts = []
    monkeypatch.setattr(module, "print_log", lambda text, **kwargs: texts.append(text))
    return texts


OBJECT = {"classes": ("background", "object")}


def binary(root, count=3):
    mask = np.zeros((8, 8))
    mask[:4, :4] = 255
    for i in range(count):
        write(root / f"images/training/{i}.jpg", np.zeros((8, 8, 3)))
        write(root / f"annotations/training/{i}.png", mask)
    return mask


def test_masks_of_0_and_255_are_refused_and_can_be_mapped(tmp_path, said):
    mask = binary(tmp_path)
    message = (
        r"the 3 label maps never hold object\. Values found: 0 \(75\.0 %\), 255 \(25\.0 %\)\. 255 is void, .*"
        r"map it: label_map=\{255: 1\}"
    )
    for test_mode in (False, True):
        with pytest.raises(DatasetError, match=message):
            build(tmp_path, SegmentationFolder, metainfo=OBJECT, test_mode=test_mode)
    dataset = build(tmp_path, SegmentationFolder, metainfo=OBJECT, label_map={255: 1})
    np.testing.assert_array_equal(dataset[0]["data_samples"].gt_sem_seg.data[0], mask == 255)
    assert dataset.metainfo["label_map"] == {255: 1} and not said
    with pytest.raises(DatasetError, match=r"label_map or reduce_zero_label=True, not both"):
        build(tmp_path, SegmentationFolder, metainfo=OBJECT, label_map={255: 1}, reduce_zero_label=True)


def test_labels_that_are_all_void(tmp_path):
    write(tmp_path / "images/training/a.jpg", np.zeros((8, 8, 3)))
    write(tmp_path / "annotations/training/a.png", np.full((8, 8), 255))
    with pytest.raises(
        DatasetError, match=r"the 1 label maps hold no class, only void\. Values found: 255 \(100\.0 %\)"
    ):
        build(tmp_path, SegmentationFolder, metainfo={"classes": ("sky", "road", "car")})


def test_a_class_that_never_occurs_is_pointed_out(own, said):
    metainfo = {"classes": ("sky", "road", "car")}
    build(own, SegmentationFolder, metainfo=metainfo)
    (text,) = said
    assert "the 1 label maps never hold car. Values found: 0 (87.5 %), 1 (12.5 %)." in text
    assert "label_map={VALUE: CLASS}" in text
    said.clear()
    build(own, SegmentationFolder, metainfo=metainfo, test_mode=True)  # a small test set need not have all
    assert not said


def test_a_rare_class_is_looked_for_beyond_the_sample(tmp_path, said, monkeypatch):
    import nepa_plugin.segmentation.datasets as module

    monkeypatch.setattr(module, "_SAMPLE", 2)
    for i in range(9):
        write(tmp_path / f"images/training/{i}.jpg", np.zeros((8, 8, 3)))
        write(tmp_path / f"annotations/training/{i}.png", np.eye(8) if i == 7 else np.zeros((8, 8)))
    build(tmp_path, SegmentationFolder, metainfo={"classes": ("sky", "road")})
    assert not said
    monkeypatch.setattr(module, "_SECONDS", -1.0)
    build(tmp_path, SegmentationFolder, metainfo={"classes": ("sky", "road")})
    assert "the 2 label maps of 9 that were read never hold road." in said[0]


def test_all_images_are_used_whatever_their_suffix_and_case(own, said):
    for name in ("b.png", "c.JPG", "d/e.jpeg"):
        write(own / "images/training" / name, np.zeros((8, 8, 3)))
        write((own / "annotations/training" / name).with_suffix(".png"), np.eye(8))
        write(own / "annotations/training" / f"alone-{name[0]}.png", np.eye(8))
    (own / "images/training/notes.txt").write_text("none")
    metainfo = {"classes": ("sky", "road")}
    dataset = build(own, SegmentationFolder, metainfo=metainfo)
    assert [dataset.get_data_info(i)["img_path"].split("training/")[1] for i in range(4)] == [
        "a.jpg",
        "b.png",
        "c.JPG",
        "d/e.jpeg",
    ]
    assert "1 file(s) in" in said[0] and "notes.txt is no image of this dataset" in said[0]
    assert "3 file(s) in" in said[1] and "is the label map of no image" in said[1]
    said.clear()
    assert len(build(own, SegmentationFolder, metainfo=metainfo, img_suffix=".jpg")) == 2
    assert "3 file(s) in" in said[0] and "b.png is no image of this dataset" in said[0]
    write(own / "images/training/a.png", np.zeros((8, 8, 3)))
    with pytest.raises(DatasetError, match=r"a\.jpg and a\.png in .* would have the same label map a\.png"):
        build(own, SegmentationFolder, metainfo=metainfo)


def test_a_photograph_is_taken_as_it_is_shown(tmp_path):
    """OpenCV, which mmcv reads with, follows the EXIF orientation."""
    pixels = np.zeros((16, 8, 3), dtype=np.uint8)
    pixels[:4] = 255  # stored: at the top; shown: on the right
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    (tmp_path / "images/training").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "images/training/a.jpg", exif=exif, quality=100)
    label = np.zeros((8, 16))
    label[:, 12:] = 1
    write(tmp_path / "annotations/training/a.png", label)
    sample = build(tmp_path, SegmentationFolder, metainfo=OBJECT)[0]
    image = sample["inputs"].float().mean(0).numpy()
    found = sample["data_samples"].gt_sem_seg.data[0].numpy()
    assert image.shape == found.shape == (8, 16) and ((image > 128) == (found == 1)).all()
    write(tmp_path / "annotations/training/a.png", np.swapaxes(label, 0, 1))
    message = r"a\.png is \(8, 16\) pixels, its image \(16, 8\) as it is shown: it has an EXIF orientation"
    with pytest.raises(DatasetError, match=message):
        build(tmp_path, SegmentationFolder, metainfo=OBJECT)
