"""Options of the methods outside their meaning are refused, from Python and from the command line."""

import pytest
from pretraining import run

from nepa_plugin import methods

TINY = {
    "backbone_args": {"embed_dim": 32, "depth": 1, "num_heads": 2},
    "img_size": 32,
    "patch_size": 8,
    "batch_size_per_device": 4,
}


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        ("NEPA", "base_lr", float("inf"), r"base_lr must be in \[0, 1e\+30\], got inf"),
        ("NEPA", "base_lr", 1e38, r"base_lr must be in \[0, 1e\+30\], got 1e\+38"),
        ("NEPA", "min_lr", -1e-6, r"min_lr must be in \[0, 1e\+30\]"),
        ("NEPA", "weight_decay", -0.05, "weight_decay must be at least 0"),
        ("NEPA", "final_weight_decay", -0.1, "final_weight_decay must be at least 0"),
        ("NEPA", "clip_grad_norm", -1.0, "clip_grad_norm must be at least 0"),
        ("NEPA", "betas", (0.9, 1.0), r"betas\[1\] must be in \[0, 1\), got 1.0"),
        ("NEPA", "warmup_fraction", 1.0, r"warmup_fraction must be in \[0, 1\)"),
        ("NEPA", "warmup_steps", -1, "warmup_steps must be at least 0"),
        ("NEPA", "ema_decay", 1.0, r"ema_decay must be in \[0, 1\)"),
        ("NEPA", "drop_path_rate", 1.0, r"drop_path_rate must be in \[0, 1\)"),
        ("NEPA", "nonfinite_steps", -1, "nonfinite_steps must be at least 0"),
        ("NEPA", "num_classes", -1, "num_classes must be at least 0"),
        ("NEPA", "batch_size_per_device", 0, "batch_size_per_device must be at least 1"),
        ("NEPA", "img_size", 0, "img_size must be at least 1"),
        ("NEPA", "patch_size", 0, "patch_size must be at least 1"),
        ("NEPA", "hflip_prob", 7, r"hflip_prob must be in \[0, 1\], got 7"),
        ("NEPA", "crop_scale", (0, 0), r"crop_scale\[0\] must be in \(0, 1\], got 0"),
        ("NEPA", "crop_scale", (0.5, 0.2), r"crop_scale must be in order, got \[0.5, 0.2\]"),
        ("SimCLR", "temperature", 0.0, "temperature must be greater than 0"),
        ("SimCLR", "projection_dim", 0, "projection_dim must be at least 1"),
        ("SimSiam", "prediction_hidden_dim", -2, "prediction_hidden_dim must be at least 1"),
        ("BYOL", "momentum", 1.5, r"momentum must be in \[0, 1\], got 1.5"),
        ("MoCoV3", "final_momentum", -0.1, r"final_momentum must be in \[0, 1\]"),
        ("MAE", "decoder_depth", 0, "decoder_depth must be at least 1"),
        ("AIM", "head_blocks", 0, "head_blocks must be at least 1"),
        ("IJEPA", "target_scale", (0.3, 0.2), r"target_scale must be in order"),
        ("IJEPA", "num_targets", 0, "num_targets must be at least 1"),
        ("DINO", "student_temp", float("nan"), "student_temp must be greater than 0, got nan"),
        ("IBOT", "batch_mask_ratio", 1.2, r"batch_mask_ratio must be in \[0, 1\]"),
        ("LeJEPA", "lambda_param", -0.5, "lambda_param must be at least 0"),
    ],
)
def test_out_of_range(name, option, value, message):
    with pytest.raises(ValueError, match=message):
        getattr(methods, name)(**(TINY | {option: value}))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("hflip_prob", "7", "error: hflip_prob must be in [0, 1], got 7.0.\n"),
        ("crop_scale", "[0,0]", "error: crop_scale[0] must be in (0, 1], got 0.0.\n"),
        ("weight_decay", "-1", "error: weight_decay must be at least 0, got -1.0.\n"),
    ],
)
def test_out_of_range_on_the_command_line(option, value, message, tmp_path, capsys):
    run("--run_dir", tmp_path / "run", f"--model.{option}", value, code=2)
    assert capsys.readouterr().err.endswith(message) and not (tmp_path / "run").exists()
