"""The trainers of an evaluation."""

import pytest
import timm
import torch

import nepa_plugin
from nepa_plugin.evaluation import EvaluationOptions, evaluate, processes
from nepa_plugin.evaluation.features import extract_depth_features
from nepa_plugin.evaluation.finetune import FinetuneOptions
from nepa_plugin.evaluation.processes import Runtime


@pytest.mark.parametrize(
    ("accelerator", "world_size", "expected"), [("cuda", 2, True), ("cuda", 1, False), ("cpu", 2, False)]
)
def test_batch_norm_sees_the_batch_of_all_devices(accelerator, world_size, expected, monkeypatch):
    """Where PyTorch can: it has no synchronised BatchNorm for the CPU."""
    monkeypatch.setattr(processes, "Trainer", lambda **kwargs: kwargs)
    runtime = Runtime(accelerator, world_size, torch.device(accelerator), world_size=world_size)
    assert runtime.trainer(3)["sync_batchnorm"] is expected


@pytest.mark.parametrize(
    ("asked", "accelerator", "used"),
    [
        ("auto", "cuda", "bf16-mixed"),
        ("auto", "cpu", "32-true"),
        ("32-true", "cuda", "32-true"),
        ("bf16-mixed", "cpu", "bf16-mixed"),
    ],
)
def test_what_is_computed_with(asked, accelerator, used):
    assert Runtime(accelerator, 1, torch.device("cpu"), asked_precision=asked).precision == used


@pytest.mark.slow
def test_bfloat16_on_the_cpu_scores_and_says_so(tmp_path):
    """Every protocol's network is computed with it, and its features are not the float32 ones."""
    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 1.0}
    model = timm.create_model("nepa_vit_tiny_patch14_224", **args)
    backbone = nepa_plugin.save_backbone(model, tmp_path / "backbone")
    scores = {}
    for precision in ("32-true", "bf16-mixed"):
        tuned = FinetuneOptions(epochs=1, batch_size=128)
        options = EvaluationOptions(precision=precision, finetune=tuned, cache=False, num_workers=0)
        found = evaluate(backbone, "digits", ["knn", "linear", "finetune"], options)["protocols"]
        assert {entry["used"]["precision"] for entry in found.values()} == {precision}
        scores[precision] = {name: entry["top1"] for name, entry in found.items()}
    for name, score in scores["32-true"].items():
        assert score == pytest.approx(scores["bf16-mixed"][name], abs=8.0)
    assert scores["32-true"] != scores["bf16-mixed"]


def test_features_in_bfloat16_are_near_those_in_float32():
    model = timm.create_model(
        "nepa_vit_tiny_patch14_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2
    )
    batch = [(torch.randn(4, 3, 32, 32), torch.arange(4), ["a"] * 4)]
    one, half = (
        extract_depth_features(model, batch, precision=precision).features["final norm"]["mean"]
        for precision in ("auto", "bf16-mixed")
    )
    assert 1e-5 < float((one - half).abs().max()) < 0.1
