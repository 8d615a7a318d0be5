import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file

import nepa_plugin
from nepa_plugin.checkpoints import name_classes
from nepa_plugin.data import digits_folder, evaluation_loaders
from nepa_plugin.evaluation import EvaluationOptions, evaluate

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "init_values": 0.5}
OPTIONS = EvaluationOptions(accelerator="cpu", num_workers=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("three")
    for split, count in (("train", 4), ("val", 13)):
        for label in "035":
            (root / split / label).mkdir(parents=True)
            for file in sorted((digits_folder() / split / label).iterdir())[:count]:
                shutil.copy(file, root / split / label)
    return root


def _classifier(names=None):
    torch.manual_seed(0)
    model = timm.create_model("nepa_vit_tiny_patch14_224", num_classes=3, attention="bidirectional", **SIZES).eval()
    torch.nn.init.normal_(model.head.weight)
    if names:
        name_classes(model, names)
    return model


def _hits(model, folder, order):
    (loader,) = evaluation_loaders(folder, model, 64)[1:]
    with torch.no_grad():
        return sum(int((model(batch)[:, order].argmax(1) == labels).sum()) for batch, labels, *_ in loader)


@pytest.mark.parametrize(
    ("names", "order"),
    [(None, [0, 1, 2]), (["zero", "three", "five"], [0, 1, 2]), (["5", "0", "3"], [1, 2, 0])],
)
def test_counts_the_heads_hits(folder, names, order):
    model = _classifier(names)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    entry = evaluate(model, folder, ["head"], OPTIONS)["protocols"]["head"]
    assert entry["top1"] == pytest.approx(100 * _hits(model, folder, order) / 39)
    assert entry["top3"] == 100
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_cannot_be_scored(folder, tmp_path):
    def fails(model, match):
        with pytest.raises(ValueError, match=match):
            evaluate(model, folder, ["head"], OPTIONS, tmp_path / "out")

    backbone = _classifier()
    backbone.reset_classifier(0, "")
    fails(backbone, "the network has no head, .* has 3 classes")
    fails(timm.create_model("nepa_vit_tiny_patch14_224", num_classes=4, **SIZES), "the network has 4 classes, .* has 3")
    fails(_classifier(["0", "3", "8"]), "knows 2 of the 3 classes .* by name, and not '5'")
    assert not (tmp_path / "out").exists()


def test_what_was_fine_tuned_scores_the_same(folder, tmp_path):
    """The exported network, read again, has the accuracy that fine-tuning reported."""
    torch.manual_seed(0)
    model = timm.create_model("nepa_vit_tiny_patch14_224", **SIZES)
    options = EvaluationOptions(accelerator="cpu", num_workers=0)
    options.finetune.epochs, options.finetune.batch_size, options.finetune.lr = 3, 4, 0.1
    tuned = evaluate(model, folder, ["finetune"], options, tmp_path)["protocols"]["finetune"]
    assert "head.weight" in load_file(tmp_path / "finetuned" / "model.safetensors")
    again = evaluate(tmp_path / "finetuned", folder, ["head"], OPTIONS)["protocols"]["head"]
    assert again["top1"] == tuned["top1"] and nepa_plugin.load_backbone(tmp_path / "finetuned").num_classes == 3
