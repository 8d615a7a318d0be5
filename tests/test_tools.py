import json
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import TOY, TOY_CLASSIFIER
from PIL import Image
from refusal import refusal
from safetensors.torch import load_file

import nepa_plugin

TOOLS = Path(__file__).parent.parent / "tools"


def tool(name, *args):
    argv, sys.argv = sys.argv, [name, *map(str, args)]
    try:
        runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = argv


@pytest.fixture
def backbone(tmp_path):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = timm.create_model("nepa_vit_tiny_patch14_224", **sizes)
    return nepa_plugin.save_backbone(model, tmp_path / "backbone")


@pytest.mark.slow
def test_evaluate_prints_and_writes_the_readout(backbone, tmp_path, capsys):
    tool("evaluate", backbone, "--data", "digits", "--protocol", "readout,knn", "--floor", "true", "--out", tmp_path)
    printed = capsys.readouterr().out
    assert "block 1" in printed and "untrained: top-1 accuracy by depth" in printed
    protocols = json.loads((tmp_path / "results.json").read_text())["protocols"]
    rows = protocols["readout"]["rows"]
    assert [row["depth"] for row in rows[::3]] == ["embedding", "block 1", "final norm"]
    assert all(5 < row[probe] <= 100 for row in rows for probe in ("knn", "linear"))
    assert protocols["knn"]["top1"] == rows[-2]["knn"]
    said = refusal(capsys, tool, "evaluate", backbone, "--data", "digits", "--protocol", "knm")
    assert said.startswith("error: protocol knm")


def test_visualize_writes_the_figure(backbone, tmp_path):
    tool("visualize", backbone, "--data", "digits", "--out", tmp_path / "s.png", "--images", 2)
    with Image.open(tmp_path / "s.png") as image:
        assert min(image.size) > 200


def test_convert_there_and_back(tmp_path, capsys):
    tool("convert_checkpoint", TOY, tmp_path / "timm")
    tool("convert_checkpoint", tmp_path / "timm", tmp_path / "nepa", "--layout", "nepa")
    a, b = load_file(TOY / "model.safetensors"), load_file(tmp_path / "nepa" / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert "exists" in refusal(capsys, tool, "convert_checkpoint", TOY, tmp_path / "timm")


def test_convert_through_every_layout_is_bit_exact(tmp_path, capsys):
    tool("convert_checkpoint", TOY_CLASSIFIER, tmp_path / "a.pth", "--layout", "mmengine")
    tool("convert_checkpoint", tmp_path / "a.pth", tmp_path / "timm")
    tool("convert_checkpoint", tmp_path / "timm", tmp_path / "nepa", "--layout", "nepa")
    a, b = load_file(TOY_CLASSIFIER / "model.safetensors"), load_file(tmp_path / "nepa" / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (tmp_path / "nepa" / "config.json").read_text() == (TOY_CLASSIFIER / "config.json").read_text()
    capsys.readouterr()
    tool("convert_checkpoint", TOY_CLASSIFIER, tmp_path / "b.pth", "--layout", "mmengine", "--dry_run")
    said = capsys.readouterr().out
    row = said[said.index("vit_nepa.encoder.layer.2.attention.attention.query.weight") :].splitlines()[0]
    assert "192 x 64" in row and "backbone.vit.blocks.2.attn.qkv.weight" in row
    weights = nepa_plugin.load_backbone(TOY_CLASSIFIER).state_dict()
    assert said.count("backbone.vit.") == len(weights) and not (tmp_path / "b.pth").exists()
    tool("convert_checkpoint", tmp_path / "a.pth", tmp_path / "other", "--dry_run")
    assert capsys.readouterr().out.count("backbone.vit.") == len(weights)  # as they are called in the source


@pytest.mark.parametrize("name", ["evaluate", "visualize"])
def test_bad_input(name, backbone, tmp_path, capsys):
    assert "No checkpoint at" in refusal(capsys, tool, name, tmp_path / "nothing", "--data", "digits")
    assert "no folder at" in refusal(capsys, tool, name, backbone, "--data", tmp_path / "nothing")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--protcol", "knn"), "unrecognized arguments: --protcol knn"),
        (("--k", "many"), 'Parser key "k"'),
        (("--protocol", "guess"), "give one or several of knn, linear"),
        (("--protocol", "knn", "--k", "5000"), "k = 5000 neighbours, but only 1400 training images"),
    ],
)
def test_bad_options_of_evaluate_are_one_line(option, message, backbone, capsys):
    assert message in refusal(capsys, tool, "evaluate", backbone, "--data", "digits", *option)
