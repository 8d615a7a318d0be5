"""The demo's config at a size that trains in seconds."""

import itertools
import json
import os
from pathlib import Path

from mmengine.config import Config

CONFIGS = Path(__file__).parents[2] / "mmseg_configs"
SIZES = {"embed_dim": 32, "depth": 4, "num_heads": 2}
_count = itertools.count()


def tiny_options(scenes, pretrained, iterations=4):
    """What to merge into nepa_tiny_digits_seg.py."""
    init_cfg = None if pretrained is None else {"type": "Pretrained", "checkpoint": str(pretrained)}
    options = {
        "model.backbone.model_args": SIZES,
        "model.backbone.init_cfg": init_cfg,
        "model.neck.embed_dim": 32,
        "model.decode_head.in_channels": [32] * 4,
        "model.decode_head.channels": 16,
        "model.auxiliary_head.in_channels": 32,
        "model.auxiliary_head.channels": 16,
        "train_cfg.max_iters": iterations,
        "train_cfg.val_interval": 2,
        "default_hooks.checkpoint.interval": 2,
        "default_hooks.logger.interval": 1,
        "param_scheduler.0.end": 2,
        "param_scheduler.1.begin": 2,
    }
    return options | {f"{loader}_dataloader.dataset.data_root": str(scenes) for loader in ("train", "val", "test")}


def as_options(options):
    """As --cfg-options takes them."""
    words = []
    for key, value in options.items():
        if key == "model.backbone.init_cfg":
            key, value = "model.backbone.init_cfg.checkpoint", value["checkpoint"]
        if key == "model.backbone.model_args":
            words += [f"{key}.{k}={v}" for k, v in value.items()]
        else:
            words.append(f"{key}={value}".replace(" ", ""))
    return ["--cfg-options", *words]


def tiny_config(scenes, pretrained, work_dir, iterations=4, **options):
    """The config; options are dotted keys with __ for the dots."""
    cfg = Config.fromfile(CONFIGS / "nepa_tiny_digits_seg.py")
    cfg.merge_from_dict(tiny_options(scenes, pretrained, iterations))
    cfg.merge_from_dict({key.replace("__", "."): value for key, value in options.items()})
    cfg.work_dir, cfg.launcher = str(work_dir), "none"
    # mmengine keeps one log and one visualizer per name in a process
    cfg.experiment_name = cfg.visualizer.name = f"test-{os.getpid()}-{next(_count)}"
    return cfg


def losses(work_dir):
    """Training losses by step, from the logs of every start."""
    rows = [json.loads(line) for file in sorted(Path(work_dir).glob("*/vis_data/2*.json")) for line in file.open()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}
