import pytest
import timm
import torch
from conftest import TOY, TOY_CLASSIFIER
from safetensors.torch import load_file

import nepa_plugin
from nepa_plugin.checkpoints import CheckpointError, export
from nepa_plugin.checkpoints.export import export_model
from nepa_plugin.commands import export as command

ATTENTION = {"causal": "last_hidden_state", "bidirectional": "last_hidden_state_bidirectional"}


def by_onnx(path, images):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_outputs())
    return name, torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def by_torch(path, images):
    return "tokens", torch.export.load(path).module()(images)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(("suffix", "run"), [("onnx", by_onnx), ("pt2", by_torch)])
def test_a_backbone_computes_the_published_states(tmp_path, expected, attention, suffix, run):
    if suffix == "onnx":
        pytest.importorskip("onnxscript")
    path = tmp_path / f"backbone.{suffix}"
    assert export_model(nepa_plugin.load_backbone(TOY, attention=attention), path) <= 1e-4
    for count in (1, 3):  # any number of images
        name, tokens = run(path, expected["pixel_values"][:count])
        assert name == "tokens"
        torch.testing.assert_close(tokens, expected[ATTENTION[attention]][:count], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_classifier_computes_the_published_logits(tmp_path, attention, capsys):
    pytest.importorskip("onnxscript")
    expected = load_file(TOY_CLASSIFIER / "expected.safetensors")
    path = tmp_path / "classifier.onnx"
    command.main([str(TOY_CLASSIFIER), str(path), "--batch", "3", "--attention", attention])
    assert "images (3, 3, 16, 16) -> logits of 7 classes, within " in capsys.readouterr().out
    name, logits = by_onnx(path, expected["pixel_values"])
    assert name == "logits"
    torch.testing.assert_close(logits, expected[f"logits_{attention}"], atol=1e-4, rtol=1e-4)
    with pytest.raises(Exception, match=r"[Gg]ot"):  # another number of images than was said
        by_onnx(path, expected["pixel_values"][:2])


def test_other_vits(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3).eval()
    export_model(model, tmp_path / "x.pt2", batch=2)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.export.load(tmp_path / "x.pt2").module()(images), model(images))


def test_what_differs_is_not_written(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(CheckpointError, match="of its largest output off PyTorch's"):
        export_model(toy, tmp_path / "x.pt2", batch=2)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(toy, tmp_path):
    (tmp_path / "x.pt2").write_text("mine")
    with pytest.raises(FileExistsError, match="exists; choose another name"):
        export_model(toy, tmp_path / "x.pt2")
    assert (tmp_path / "x.pt2").read_text() == "mine"
