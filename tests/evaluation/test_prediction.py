import csv
import io
import os
import shutil
import sys

import pytest
import timm
import torch
from PIL import Image

import nepa_plugin
from nepa_plugin.checkpoints import name_classes
from nepa_plugin.commands import predict as command
from nepa_plugin.data import digits_folder, evaluation_loaders
from nepa_plugin.evaluation.prediction import Prediction, image_files, load_classifier, predict

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "init_values": 0.5}
NAMES = ["zero", "one", "two [red]", "three"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model("nepa_vit_tiny_patch14_224", num_classes=4, **SIZES)
    torch.nn.init.normal_(model.head.weight)
    name_classes(model, NAMES)
    return nepa_plugin.save_backbone(model, tmp_path_factory.mktemp("classifier") / "finetuned")


@pytest.fixture
def photos(tmp_path):
    """Eight digits in a folder with a damaged file, an empty one, a text, and a pipe."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for i, file in enumerate(sorted((digits_folder() / "val" / "3").iterdir())[:8]):
        shutil.copy(file, (folder / "more" if i > 4 else folder) / f"{i}.png")
    (folder / "2a.png").write_bytes((folder / "0.png").read_bytes()[:60])
    (folder / "7z.JPG").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    os.mkfifo(folder / "pipe.png")
    return folder


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_probabilities_are_the_networks(classifier, photos, batch_size):
    model = load_classifier(classifier)
    files = image_files([photos])
    assert [file.name for file in files if file.parent == photos] == [
        *("0.png", "1.png", "2.png", "2a.png", "3.png", "4.png", "7z.JPG", "pipe.png")
    ]
    found = list(predict(model, files, top=3, batch_size=batch_size, num_workers=0))
    assert [entry.path if isinstance(entry, Prediction) else entry[0] for entry in found] == files
    unread = {entry[0].name: entry[1] for entry in found if not isinstance(entry, Prediction)}
    assert unread == {"2a.png": "damaged", "7z.JPG": "damaged", "pipe.png": "no regular file"}
    loader = evaluation_loaders("digits", model, 512)[1]
    images = {os.path.basename(name): image for batch in loader for image, name in zip(batch[0], batch[2], strict=True)}
    wanted = [images[file.name] for file in sorted((digits_folder() / "val" / "3").iterdir())[:8]]
    with torch.no_grad():
        probabilities = model(torch.stack(wanted)).softmax(1)
    predictions = {entry.path.name: entry for entry in found if isinstance(entry, Prediction)}
    for i, expected in enumerate(probabilities):
        values, classes = expected.topk(3)
        assert predictions[f"{i}.png"].probabilities == pytest.approx(values.tolist(), abs=1e-6)
        assert predictions[f"{i}.png"].classes == [NAMES[c] for c in classes]


def test_the_command_writes_a_table_a_csv_and_a_picture(classifier, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{photos / '0.png'}\n\n{photos / '2a.png'}\n"))
    command.main([str(classifier), str(photos / "more"), "-", "--out", str(tmp_path / "out"), "--top", "2"])
    said = capsys.readouterr()
    assert said.err == f"not read: {photos / '2a.png'} (damaged)\n"
    assert "predictions.csv" in said.out and "%" in said.out
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [str(photos / "more" / f"{i}.png") for i in (5, 6, 7)] + [
        str(photos / "0.png")
    ]
    assert list(rows[0]) == ["image", "class_1", "probability_1", "class_2", "probability_2"]
    assert all(float(row["probability_1"]) >= float(row["probability_2"]) and row["class_1"] in NAMES for row in rows)
    with Image.open(tmp_path / "out" / "predictions.png") as picture:
        assert min(picture.size) > 200


def test_a_classifier_without_names_says_numbers(photos, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("nepa_vit_tiny_patch14_224", num_classes=3, **SIZES)
    folder = nepa_plugin.save_backbone(model, tmp_path / "finetuned")
    (found,) = predict(load_classifier(folder), [photos / "0.png"], num_workers=0)
    assert sorted(found.classes) == ["0", "1", "2"] and sum(found.probabilities) == pytest.approx(1)
