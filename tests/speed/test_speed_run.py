"""The benchmark as a user runs it."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from refusal import refusal

from nepa_plugin.data import digits_folder
from nepa_plugin.speed import Case, Options, benchmark, cases
from nepa_plugin.speed.clock import PHASES
from nepa_plugin.speed.written_out import WrittenOut

TOOL = Path(__file__).parents[2] / "tools" / "benchmark.py"
TINY = ["--model", "tiny", "--img-size", "28", "--depth", "2", "--batch-size", "2", "--accelerator", "cpu"]
FAST = ["--steps", "2", "--warmup", "1", "--rounds", "2"]


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", [str(TOOL), *TINY, *FAST, *map(str, args)])
    runpy.run_path(str(TOOL), run_name="__main__")


def test_combinations():
    found = cases(["timm", "mae"], model=["tiny"], batch_size=[1, 2], attention=["causal", "bidirectional"])
    names = [(case.contender, case.batch_size, case.attention) for case in found]
    assert names[:4] == [("nepa", b, a) for b in (1, 2) for a in ("causal", "bidirectional")]
    # what has no causal attention is there once
    assert names[4:] == [(name, b, "bidirectional") for name in ("timm", "mae") for b in (1, 2)]


@pytest.mark.slow
def test_side_by_side(tmp_path, monkeypatch, capsys):
    out = tmp_path / "speed.json"
    both = ["--precision", "32-true", "bf16-mixed"]
    run(monkeypatch, "--compare", "timm", "simclr", "mae", *both, "--rounds", 1, "--out", out)
    results = json.loads(out.read_text())
    rows = results["results"]
    assert [row["contender"] for row in rows] == ["nepa"] * 2 + ["timm"] * 2 + ["simclr"] * 2 + ["mae"] * 2
    assert set(results["matrix_peak"]) == {"torch.float32", "torch.bfloat16"}
    for row in rows:
        seconds, rate = row["seconds"], row["images_per_second"]
        assert all(seconds[phase] >= 0 for phase in PHASES) and min(seconds["forward"], seconds["backward"]) > 0
        assert rate["smallest"] <= rate["median"] <= rate["largest"]
        assert rate["median"] == pytest.approx(2 / seconds["step"], rel=1)  # batch over seconds, by other medians
        peak = results["matrix_peak"]["torch.float32" if row["precision"] == "32-true" else "torch.bfloat16"]
        assert row["utilisation"] == pytest.approx(row["flops_per_image"] * rate["median"] / peak)
        assert row["utilisation"] < 1
    nepa, timm = rows[0], rows[2]
    assert nepa["seconds"]["ema"] > timm["seconds"]["ema"]  # timm's step has none
    assert nepa["seconds"]["loss"] > 0 and nepa["flops_per_image"] == pytest.approx(timm["flops_per_image"], rel=1e-6)
    assert rows[4]["flops_per_image"] > 1.9 * nepa["flops_per_image"]  # two views
    assert "ratio" in capsys.readouterr().out


@pytest.mark.slow
def test_images_from_a_folder(tmp_path, monkeypatch):
    out = tmp_path / "speed.json"
    run(monkeypatch, "--data", digits_folder() / "train", "--num-workers", "0", "--compile", "--out", out)
    (row,) = json.loads(out.read_text())["results"]
    assert row["seconds"]["data"] > 0 and row["compiled"]
    rate = row["images_per_second"]
    assert rate["smallest"] < rate["median"] < rate["largest"]  # two rounds


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--compare", "maee"], "No method 'maee'"),
        (["--model", "giant"], "model='giant' is none of tiny"),
        (["--img-size", "30"], "30 is no multiple of patch_size 14"),
        (["--data", "/nowhere"], "no folder at /nowhere"),
        (["--devices", "999"], "999 asks for more than this machine has"),
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
        (["--compare", "timm", "--data", "/nowhere"], "one device and random images"),
        (["--compare", "written-out", "--devices", "2"], "timm and written-out are timed on one device"),
        (["--precision", "8-true"], "is none of 32-true"),
    ],
)
def test_errors(args, message, monkeypatch, capsys):
    assert message in refusal(capsys, run, monkeypatch, *args)


def test_every_contender_is_built():
    for name in (
        "nepa",
        "simclr",
        "mocov3",
        "simsiam",
        "byol",
        "dino",
        "lejepa",
        "mae",
        "ijepa",
        "aim",
        "ibot",
        "beit",
        "igpt",
        "cpc",
    ):
        method = Case(name, model="tiny", depth=1, attention="bidirectional").method()
        assert type(method).__name__.lower() == name and len(method.backbone.blocks) == 1
        assert method.backbone.embed_dim == 192
    assert Case("timm", model="tiny", img_size=56, depth=1).plain().embed_dim == 192


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_the_written_out_step_is_nepas(attention):
    case = Case(model="tiny", img_size=56, depth=2, attention=attention)
    method = case.method()
    torch.manual_seed(0)
    with torch.no_grad():  # LayerScale's 1e-5 would hide the blocks
        for block in method.backbone.blocks:
            block.gamma_1.fill_(0.5), block.gamma_2.fill_(0.5)
            block.attn.qkv.bias.normal_()
    images = torch.randn(3, 3, 56, 56)
    names = [name for name, _ in method.backbone.named_parameters()]
    found = []
    for step in (lambda: method.step([images])[0], lambda: WrittenOut(method.backbone)(images)):
        method.zero_grad()
        method.eval()  # RoPE is rescaled by chance in training
        loss = step()
        loss.backward()
        found.append([loss.detach(), *(method.backbone.get_parameter(name).grad for name in names)])
    for name, ours, theirs in zip(["loss", *names], *found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-3, msg=name)
    plain = Case("written-out", model="tiny", img_size=56, depth=2, attention=attention).plain()
    assert plain.model.attention == attention and len(plain.model.blocks) == 2


def test_two_rounds_of_one_case():
    result = benchmark([Case(model="tiny", img_size=28, batch_size=2, depth=1)], Options(2, 1, 2, "cpu"))
    (row,) = result["results"]
    assert row["tokens"] == 5 and result["devices"] == 1 and result["options"]["rounds"] == 2


def test_profile(tmp_path, monkeypatch, capsys):
    out = tmp_path / "kernels.json"
    run(monkeypatch, "--profile", "--out", out)
    kernels = json.loads(out.read_text())["kernels"]
    assert sum(kernel["share"] for kernel in kernels) == pytest.approx(1)
    calls = {kernel["name"]: kernel["calls"] for kernel in kernels}
    assert calls["aten::_scaled_dot_product_flash_attention_for_cpu"] == 2  # one for each block
    assert "aten::_softmax" not in calls and "aten::bmm" not in calls
    assert "calls per step" in capsys.readouterr().out


@pytest.mark.slow
def test_two_devices(tmp_path):
    """Both processes take part; one of them reports."""
    out = tmp_path / "speed.json"
    result = subprocess.run(
        [sys.executable, str(TOOL), *TINY, *FAST, "--devices", "2", "--out", str(out)],
        env=dict(os.environ, PYTHONPATH=str(TOOL.parents[1])),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stderr.count("round 1/2") == 1 and result.stdout.count("matrix peak") == 1
    results = json.loads(out.read_text())
    (row,) = results["results"]
    assert results["devices"] == 2
    assert row["images_per_second"]["median"] == pytest.approx(2 * 2 / row["seconds"]["step"], rel=1)
