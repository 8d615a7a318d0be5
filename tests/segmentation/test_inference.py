import csv

import numpy as np
import pytest
import torch

pytest.importorskip("mmseg")
from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image
from sklearn.metrics import jaccard_score
from tiny import CONFIGS

from nepa_plugin.checkpoints import CheckpointError, read_tensors
from nepa_plugin.segmentation import ConfigError, DatasetError
from nepa_plugin.segmentation.inference import (
    class_iou,
    load_segmentor,
    plot_segmentation,
    predict,
    read_labels,
    write_class_iou,
)


@pytest.fixture(scope="module")
def model(run):
    return load_segmentor(run / "config.py", run / "iter_4.pth")


@pytest.fixture(scope="module")
def images(scenes):
    return sorted((scenes / "images/validation").iterdir())


def labels_of(image, model):
    return read_labels(image.parents[2] / "annotations" / image.parent.name / image.name, model)


def test_the_mean_iou_is_that_of_mmsegmentation(run, model, images, tmp_path):
    predictions, labels = [predict(model, i) for i in images], [labels_of(i, model) for i in images]
    assert all(p.shape == (32, 64) for p in predictions)
    mean = write_class_iou(class_iou(predictions, labels, 11), model.dataset_meta["classes"], tmp_path / "iou.csv")
    cfg = Config.fromfile(run / "config.py")
    cfg.load_from, cfg.work_dir, cfg.experiment_name = str(run / "iter_4.pth"), str(tmp_path / "w"), "test-iou"
    assert mean == pytest.approx(Runner.from_cfg(cfg).test()["mIoU"], abs=0.006)  # it rounds to two digits


def test_class_iou_equals_sklearns(tmp_path):
    rng = np.random.default_rng(0)
    labels = [rng.integers(0, 4, (9, 7)).astype(np.uint8) for _ in range(3)]
    predictions = [np.where(rng.random(y.shape) < 0.6, y, rng.integers(0, 4, y.shape)) for y in labels]
    labels[0][:2] = 255
    scores = class_iou(predictions, labels, 5)
    flat_y, flat_p = (np.concatenate([m.ravel() for m in maps]) for maps in (labels, predictions))
    known = flat_y != 255
    expected = jaccard_score(flat_y[known], flat_p[known], labels=range(4), average=None)
    np.testing.assert_allclose(scores["IoU"][:4], expected, rtol=1e-6)
    assert np.isnan(scores["IoU"][4]) and scores["pixels"].tolist() == np.bincount(flat_y[known], minlength=5).tolist()
    mean = write_class_iou(scores, ["a", "b", "c", "d", "never"], tmp_path / "iou.csv")
    assert mean == pytest.approx(100 * expected.mean())
    with (tmp_path / "iou.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["class"] for r in rows] == ["a", "b", "c", "d", "never", "mean"]
    assert float(rows[0]["IoU"]) == pytest.approx(100 * expected[0], abs=0.005)
    assert rows[4]["IoU"] == "" and int(rows[5]["label pixels"]) == known.sum()


def test_the_checkpoint_must_fit(run, tmp_path):
    stored = read_tensors(run / "iter_4.pth")
    stored["state_dict"].pop("backbone.vit.cls_token")
    torch.save(stored, tmp_path / "damaged.pth")
    with pytest.raises(CheckpointError, match=r"damaged\.pth does not fit.*missing: backbone\.vit\.cls_token"):
        load_segmentor(run / "config.py", tmp_path / "damaged.pth")
    (tmp_path / "garbage.pth").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="cannot be read as tensors only"):
        load_segmentor(run / "config.py", tmp_path / "garbage.pth")
    with pytest.raises(FileNotFoundError, match=r"No checkpoint at .*nothing\.pth"):
        load_segmentor(run / "config.py", tmp_path / "nothing.pth")
    with pytest.raises(FileNotFoundError, match="No config at"):
        load_segmentor(tmp_path / "nothing.py", run / "iter_4.pth")


def test_the_multi_scale_config_is_refused(run):
    with pytest.raises(ConfigError, match="Give the config that it is based on"):
        load_segmentor(CONFIGS / "nepa_vit_b_ade20k_ms.py", run / "iter_4.pth")


def test_bad_images_and_labels(model, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(DatasetError, match=r"text\.jpg cannot be read as an image"):
        predict(model, tmp_path / "text.jpg")
    Image.fromarray(np.full((4, 4), 12, dtype=np.uint8)).save(tmp_path / "map.png")
    with pytest.raises(DatasetError, match=r"map\.png has class 11, the model 11 classes"):
        read_labels(tmp_path / "map.png", model)


def test_void_labels(model, tmp_path):
    Image.fromarray(np.array([[0, 1, 11, 255]], dtype=np.uint8)).save(tmp_path / "map.png")
    assert read_labels(tmp_path / "map.png", model).tolist() == [[255, 0, 10, 255]]


def test_labels_are_those_of_the_training_pipeline(model, scenes, monkeypatch):
    """Also where a dataset of some of the classes maps the others to void."""
    from mmengine.registry import init_default_scope

    from nepa_plugin.segmentation import DigitScenes

    init_default_scope("mmseg")
    prefix = {"img_path": "images/validation", "seg_map_path": "annotations/validation"}
    pipeline = [{"type": "LoadAnnotations"}]
    some = {"classes": ("background", "digit 3", "digit 0")}
    for metainfo in (None, some):
        dataset = DigitScenes(data_root=str(scenes), data_prefix=dict(prefix), pipeline=pipeline, metainfo=metainfo)
        monkeypatch.setattr(model, "dataset_meta", dataset.metainfo)
        seen = set()
        for item in dataset:
            labels = read_labels(item["seg_map_path"], model)
            np.testing.assert_array_equal(labels, item["gt_seg_map"])
            seen |= set(np.unique(labels))
        assert len(seen) > 2 and max(seen - {255}) < len(dataset.metainfo["classes"])


def test_colours_of_the_picture(model, tmp_path):
    """A picture whose left half is predicted as class 1 shows that class's colour there and not on void."""
    pixels = np.full((40, 80, 3), 128, dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    prediction = np.zeros((40, 80), dtype=np.int64)
    prediction[:, :40] = 1
    labels = np.full((40, 80), 255, dtype=np.uint8)
    plot_segmentation(tmp_path / "grey.png", prediction, labels, model.dataset_meta, tmp_path / "out.png")
    picture = np.asarray(Image.open(tmp_path / "out.png").convert("RGB")).astype(int)
    for index in (0, 1):
        colour = np.round(0.4 * 128 + 0.6 * np.array(model.dataset_meta["palette"][index]))
        assert (np.abs(picture - colour).max(-1) <= 1).sum() > 5000, index
    assert (np.abs(picture - 128).max(-1) == 0).sum() > 4 * 5000  # image and label panel
