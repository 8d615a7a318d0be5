"""Segmentation as a way to compare backbones: any config of this package, its head replaced by a light one.

python -m nepa_plugin.segmentation.transfer mmseg_configs/nepa_tiny_digits_seg.py --check
python -m nepa_plugin.segmentation.transfer CONFIG --backbone runs/mine/backbone --frozen --work-dir DIR

Data, schedule and crops are the config's. The backbone is the one that is given, with features after four of its
blocks, put side by side for a head of one 1x1 convolution of 128 channels and a linear layer. What is light cannot make
up for what a backbone has not learned; with ``--frozen`` nothing else is trained.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from nepa_plugin.checkpoints import load_backbone, read_checkpoint
from nepa_plugin.runtime.files import file_hash, write_json

CHANNELS = 128
#: Arguments of a stored backbone that a segmentation sets itself.
_OWN = ("img_size", "num_classes", "global_pool", "dynamic_img_size", "drop_path_rate", "attention")


def four_depths(depth: int) -> list[int]:
    """Return four blocks of so many, evenly spaced, the last one among them; fewer where there are fewer."""
    return sorted({max(0, depth * (i + 1) // 4 - 1) for i in range(4)})


def transfer_config(config: str | Path, backbone: str | Path, frozen: bool, work_dir: str | Path, seed: int = 0) -> Any:
    """Return a config with another backbone and the light head.

    Args:
        config: An mmsegmentation config whose backbone is a ``TimmViT``.
        backbone: Anything :func:`nepa_plugin.load_backbone` reads.
        frozen: Train the head alone.
        work_dir: Where the run goes; one that was stopped there goes on.
        seed: Of the run.

    Returns:
        An mmengine ``Config``.
    """
    from mmengine.config import Config

    cfg = Config.fromfile(config)
    arch, args, _ = read_checkpoint(backbone)
    network: Any = load_backbone(backbone)
    depth, width, patch = len(network.blocks), int(network.num_features), int(network.patch_embed.patch_size[0])
    blocks = four_depths(depth)
    given = cfg.model.backbone
    size = given.get("img_size") or network.patch_embed.img_size[0]
    sides = [-(-side // patch) * patch for side in ([size] * 2 if isinstance(size, int) else size)]
    head = cfg.model.decode_head
    cfg.model.backbone = {
        "type": "TimmViT",
        "arch": arch,
        "img_size": tuple(sides),
        "out_indices": tuple(blocks),
        "drop_path_rate": 0.0 if frozen else given.get("drop_path_rate", 0.0),
        "attention": given.get("attention", "bidirectional"),
        "frozen_stages": depth if frozen else -1,
        "model_args": {name: value for name, value in args.items() if name not in _OWN},
        "init_cfg": {"type": "Pretrained", "checkpoint": str(backbone)},
    }
    cfg.model.neck = cfg.model.auxiliary_head = None
    cfg.model.decode_head = {
        "type": "FCNHead",
        "in_channels": [width] * len(blocks),
        "in_index": list(range(len(blocks))),
        "input_transform": "resize_concat",
        "channels": CHANNELS,
        "num_convs": 1,
        "kernel_size": 1,
        "concat_input": False,
        "dropout_ratio": 0.1,
        "num_classes": head.num_classes,
        "norm_cfg": {"type": "SyncBN", "requires_grad": True},
        "align_corners": False,
        "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
    }
    for name in ("mean", "std"):
        cfg.model.data_preprocessor[name] = [255 * value for value in network.pretrained_cfg[name]]
    cfg.work_dir, cfg.launcher, cfg.resume = str(work_dir), "none", True
    cfg.randomness = {"seed": seed}
    return cfg


def transfer(config: str | Path, backbone: str | Path, frozen: bool, work_dir: str | Path, seed: int = 0) -> float:
    """Train and score, and write ``result.json``; arguments as for :func:`transfer_config`.

    Returns:
        The mean IoU on the validation images, in per cent, after the last step.
    """
    from mmengine.runner import Runner

    start = time.perf_counter()
    runner = Runner.from_cfg(transfer_config(config, backbone, frozen, work_dir, seed))
    runner.train()
    metrics = runner.val_loop.run()
    (score,) = [float(value) for name, value in metrics.items() if name.rsplit("/", 1)[-1] == "mIoU"]
    about = {"mIoU": score, "frozen": frozen, "seed": seed, "seconds": round(time.perf_counter() - start, 1)}
    write_json(Path(work_dir) / "result.json", about | {"config": str(config), "config_sha256": file_hash(config)})
    return score


def check(config: str | Path) -> None:
    """Check that a config's images are there, and that its backbone can be replaced.

    Raises:
        ConfigError: If the backbone is no ``TimmViT``.
        DatasetError: If the images are not there.
    """
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from mmseg.registry import DATASETS

    from nepa_plugin.segmentation.errors import ConfigError

    cfg = Config.fromfile(config)
    init_default_scope("mmseg")
    if cfg.model.get("backbone", {}).get("type") != "TimmViT" or "decode_head" not in cfg.model:
        raise ConfigError(f"{config}: to compare backbones it needs a TimmViT and a decode_head, which are replaced.")
    for loader in ("train_dataloader", "val_dataloader"):
        DATASETS.build(cfg[loader].dataset)


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    import nepa_plugin.segmentation  # noqa: F401, registers what configs name

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--check", action="store_true", help="only check the config and its images")
    parser.add_argument("--backbone")
    parser.add_argument("--frozen", action="store_true", help="train the head alone")
    parser.add_argument("--work-dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(args)
    if given.check:
        check(given.config)
        return
    score = transfer(given.config, given.backbone, given.frozen, given.work_dir, given.seed)
    print(f"mIoU {score:.2f} %")


if __name__ == "__main__":
    main()
