"""What ``mim train`` and ``mim test`` refuse, and in which words: one line, before or at the first step."""

from fractions import Fraction

import pytest
import scripts
import torch
from tiny import CONFIGS, as_options, tiny_options

pytest.importorskip("mmseg")
CONFIG = CONFIGS / "nepa_tiny_digits_seg.py"
BACKBONE, OPTIMIZER = "model.backbone", "optim_wrapper.optimizer"
CHECKPOINT = f"{BACKBONE}.init_cfg.checkpoint"

#: What is added to --cfg-options -> a part of the one line.
ROWS = {
    # -- checkpoints
    f"{CHECKPOINT}={{place}}/cut.pth": "cut.pth cannot be read as tensors only: it is cut off",
    f"{CHECKPOINT}={{place}}/empty.pth": "empty.pth cannot be read as tensors only: it is empty",
    f"{CHECKPOINT}={{place}}/text.pth": "text.pth cannot be read as tensors only",
    f"{CHECKPOINT}={{place}}/refused.pth": "it holds a fractions.Fraction, and unpickling that could run any code",
    f"{CHECKPOINT}={{place}}/list.pth": "list.pth does not say how to build its backbone",
    f"{CHECKPOINT}={{place}}/nodict.pth": "nodict.pth holds no 'state_dict'",
    f"{CHECKPOINT}={{place}}/other.pth": "other.pth does not say how to build its backbone",
    f"{CHECKPOINT}={{place}}/missing.pth": "missing.pth: give a folder with config.json and model.safetensors",
    f"{CHECKPOINT}=no/such/folder/": "No checkpoint at no/such/folder",
    f"{CHECKPOINT}=no/such": "No local folder no/such, and it could not be fetched",
    f"{CHECKPOINT}=3": "init_cfg.checkpoint=3 is no path and no hub id.",
    "load_from={place}/cut.pth": "cut.pth cannot be read as tensors only: it is cut off",
    "load_from={place}/empty.pth": "empty.pth cannot be read as tensors only: it is empty",
    "load_from={place}/refused.pth": "it holds a fractions.Fraction",
    "load_from={place}/list.pth": "list.pth is no checkpoint of a segmentation run",
    "load_from={place}/other.pth": "other.pth does not fit EncoderDecoder; nothing was loaded",
    "load_from={place}/missing.pth": "No checkpoint at ",
    # -- backbone and heads
    f"{BACKBONE}.attention=sideways": "attention='sideways' is not one of ('causal', 'bidirectional').",
    f"{BACKBONE}.arch=nepa_vit_tinny": "arch='nepa_vit_tinny' is not a timm model.",
    f"{BACKBONE}.arch=nepa_vit_tny_patch14_224": "Did you mean nepa_vit_tiny_patch14_224",
    f"{BACKBONE}.out_indices=(0,1,2,9)": "has 4 blocks, 0 to 3; choose among them.",
    f"{BACKBONE}.out_indices=(0,1,2,x)": "out_indices: 'x' is no whole number.",
    f"{BACKBONE}.model_args.depth=0": "has 0 blocks",
    f"{BACKBONE}.model_args.num_heads=3": "embed_dim=32 must be a multiple of 4 x num_heads=3",
    f"{BACKBONE}.model_args.embed_dim=-4": "embed_dim=-4 must be",
    f"{BACKBONE}.model_args.dpeth=3": "unexpected keyword argument 'dpeth'",
    f"{BACKBONE}.dpeth=3": "TimmViT.__init__() got an unexpected keyword argument 'dpeth'",
    f"{BACKBONE}.frozen_stages=99": "frozen_stages=99: ",
    f"{BACKBONE}.frozen_stages=x": "frozen_stages: 'x' is no whole number.",
    f"{BACKBONE}.img_size=0": "Image size (0, 0) is not divisible",
    f"{BACKBONE}.drop_path_rate=7": "model.backbone.drop_path_rate must be in [0, 1), got 7.",
    f"{BACKBONE}.model_args.drop_path_rate=nan": "model.backbone.model_args.drop_path_rate must be",
    "model.neck.embed_dim=31": "model.neck.embed_dim and the in_channels of the heads must be the backbone's width",
    "model.decode_head.channels=0": "model.decode_head.channels must be at least 1, got 0.",
    "model.decode_head.channels=x": "model.decode_head.channels must be a whole number, got 'x'.",
    "model.decode_head.num_classes=0": "model.decode_head.num_classes must be at least 1, got 0.",
    "model.decode_head.num_classes=7": "Set model.decode_head.num_classes=11.",
    "model.decode_head.type=UPPerHead": "UPPerHead is not in the mmseg::model registry",
    "model.decode_head.in_channels=[32,32]": "UPerHead: AssertionError",
    "model.decode_head.dropout_ratio=7": "model.decode_head.dropout_ratio must be in [0, 1], got 7.",
    "model.decode_head.dropout_ratio=nan": "model.decode_head.dropout_ratio must be in [0, 1], got nan.",
    "model=3": "model should be a nn.Module object or dict, but got 3",
    "model.test_cfg.mode=sliding": "model.test_cfg.mode='sliding' is not one of 'whole', 'slide'.",
    "model.test_cfg.mode=slide": "needs model.test_cfg.crop_size and model.test_cfg.stride.",
    # -- images
    "train_dataloader.batch_size=0": "train_dataloader.batch_size must be at least 1, got 0.",
    "train_dataloader.batch_size=-1": "train_dataloader.batch_size must be at least 1, got -1.",
    "train_dataloader.batch_size=x": "train_dataloader.batch_size must be a whole number, got 'x'.",
    "train_dataloader.batch_size=2.5": "train_dataloader.batch_size must be a whole number, got 2.5.",
    "train_dataloader.batch_size=1": "BatchNorm needs more than one image per device",
    "train_dataloader.num_workers=-1": "train_dataloader.num_workers must be at least 0, got -1.",
    "train_dataloader.sampler.type=Sampler": "Sampler is not in the mmseg::data sampler registry",
    "train_dataloader.dataset.data_root=/no/such": "DigitScenes: no folder at /no/such/images/training.",
    "val_dataloader.dataset.data_root=/no/such": "DigitScenes: no folder at /no/such/images/validation.",
    "train_dataloader.dataset.type=NoDataset": "NoDataset is not in the mmseg::dataset registry",
    "train_dataloader.dataset.reduce_zero_label=False": "label 0 is void and classes count from 1",
    "train_dataloader.dataset.label_map=3": "label_map=3 is no mapping such as {255: 1}.",
    "train_dataloader.dataset.pipeline.0.type=LoadImage": "LoadImage is not in the mmseg::transform registry",
    "train_dataloader.dataset.pipeline.7.type=LoadImage": "Index 7 exceeds the length of list",
    # -- optimizer and schedule
    f"{OPTIMIZER}.lr=nan": "optim_wrapper.optimizer.lr must be in (0, 1e+30], got nan.",
    f"{OPTIMIZER}.lr=-1": "optim_wrapper.optimizer.lr must be in (0, 1e+30], got -1.",
    f"{OPTIMIZER}.lr=0": "optim_wrapper.optimizer.lr must be in (0, 1e+30], got 0.",
    f"{OPTIMIZER}.lr=inf": "optim_wrapper.optimizer.lr must be in (0, 1e+30], got inf.",
    f"{OPTIMIZER}.lr=x": "optim_wrapper.optimizer.lr must be a number, got 'x'.",
    f"{OPTIMIZER}.lr=1e30": "The loss is nan at step 2. Lower optim_wrapper.optimizer.lr",
    f"{OPTIMIZER}.weight_decay=-1": "optim_wrapper.optimizer.weight_decay must be at least 0, got -1.",
    f"{OPTIMIZER}.weight_decay=nan": "optim_wrapper.optimizer.weight_decay must be at least 0, got nan.",
    f"{OPTIMIZER}.betas=(2,3)": "AdamW: Invalid beta parameter at index 0: 2",
    f"{OPTIMIZER}.type=AdamX": "None is not a callable object",
    "optim_wrapper.type=Wrapper": "Wrapper is not in the mmseg::optim_wrapper registry",
    "optim_wrapper.clip_grad.max_norm=-1": "optim_wrapper.clip_grad.max_norm must be greater than 0, got -1.",
    "optim_wrapper.clip_grad.max_norm=0": "optim_wrapper.clip_grad.max_norm must be greater than 0, got 0.",
    "optim_wrapper.clip_grad.max_norm=nan": "optim_wrapper.clip_grad.max_norm must be greater than 0, got nan.",
    "optim_wrapper.accumulative_counts=0": "optim_wrapper.accumulative_counts must be at least 1, got 0.",
    "optim_wrapper.paramwise_cfg.layer_decay=0": "give exactly dict(layer_decay=d) with 0 < d <= 1.",
    "optim_wrapper.paramwise_cfg.layer_decay=nan": "give exactly dict(layer_decay=d) with 0 < d <= 1.",
    "optim_wrapper.paramwise_cfg.layer_decay=2": "give exactly dict(layer_decay=d) with 0 < d <= 1.",
    "optim_wrapper.paramwise_cfg.layerdecay=0.5": "give exactly dict(layer_decay=d) with 0 < d <= 1.",
    "optim_wrapper.constructor=Nope": "Nope is not in the mmseg::optimizer wrapper constructor registry",
    "optimizer.lr=1e-4": "--cfg-options optimizer.lr: nothing reads optimizer; did you mean optim_wrapper?",
    "max_iters=5": "--cfg-options max_iters: nothing reads max_iters",
    "train_cfg.max_iters=0": "train_cfg.max_iters must be at least 1, got 0.",
    "train_cfg.max_iters=-1": "train_cfg.max_iters must be at least 1, got -1.",
    "train_cfg.max_iters=2.5": "train_cfg.max_iters must be a whole number, got 2.5.",
    "train_cfg.max_iters=x": "train_cfg.max_iters must be a whole number, got 'x'.",
    "train_cfg.max_iters=2": "begins at step 2, but the run ends at train_cfg.max_iters = 2.",
    "train_cfg.max_iter=3": "IterBasedTrainLoop.__init__() got an unexpected keyword argument 'max_iter'",
    "train_cfg.val_interval=0": "train_cfg.val_interval must be at least 1, got 0.",
    "train_cfg.val_interval=-1": "train_cfg.val_interval must be at least 1, got -1.",
    "train_cfg.type=Loop": "Loop is not in the mmseg::loop registry",
    "param_scheduler.0.type=Polly": "Polly is not in the mmseg::parameter scheduler registry",
    "param_scheduler.0.begin=5": "param_scheduler.0 (LinearLR) begins at step 5, but param_scheduler.0.end is 2.",
    "param_scheduler.0.start_factor=7": "param_scheduler.0.start_factor must be in [0, 1], got 7.",
    "param_scheduler.1.end=3": "ends at 3 with a learning rate of 0, train_cfg.max_iters is 4",
    "param_scheduler.1.power=nan": "param_scheduler.1.power must be at least 0, got nan.",
    "param_scheduler.1.eta_min=1": "param_scheduler.1.eta_min 1 is above the peak, optim_wrapper.optimizer.lr 0.003.",
    "param_scheduler.5.end=1": "Index 5 exceeds the length of list",
    # -- the rest
    "default_hooks.checkpoint.save_best=mIOU": "save_best='mIOU' is no score of val_evaluator: choose among aAcc, mIoU",
    "default_hooks.logger.interval=0": "default_hooks.logger.interval must be at least 1, got 0.",
    "custom_hooks.0.type=Nope": "Nope is not in the mmseg::hook registry",
    "randomness.seed=x": "randomness.seed must be a whole number, got 'x'.",
    "randomness.seed=-1": "randomness.seed must be at least 0, got -1.",
    "val_evaluator.type=Nope": "Nope is not in the mmseg::metric registry",
    "val_evaluator.iou_metrics=['mIoUU']": "val_evaluator.iou_metrics has 'mIoUU': choose among mIoU, mDice, mFscore.",
    "visualizer.type=Nope": "Nope is not in the mmseg::visualizer registry",
    "launcher=nope": "Invalid launcher type: nope",
}


@pytest.fixture(scope="module")
def options(scenes, backbone_folder):
    return as_options(tiny_options(scenes, backbone_folder))


@pytest.fixture(scope="module")
def place(tmp_path_factory, run):
    root = tmp_path_factory.mktemp("place")
    whole = (run / "iter_4.pth").read_bytes()
    (root / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (root / "empty.pth").touch()
    (root / "text.pth").write_text("a text")
    torch.save({"state_dict": {"a": Fraction(1)}}, root / "refused.pth")
    torch.save({"state_dict": [1]}, root / "list.pth")
    torch.save([1], root / "nodict.pth")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, root / "other.pth")
    return root


def one_line(name, arguments, tmp_path):
    status, text = scripts.run(name, arguments, tmp_path / "output")
    lines = text.splitlines()
    assert status == 1 and not any(line.startswith("Traceback") for line in lines), text[-3000:]
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], text[-3000:]
    return lines[-1]


@pytest.mark.parametrize(("option", "message"), ROWS.items(), ids=ROWS)
def test_training_ends_in_one_line(option, message, options, place, tmp_path):
    work_dir = tmp_path / "w"
    line = one_line("train", [CONFIG, "--work-dir", work_dir, *options, option.format(place=place)], tmp_path)
    assert message in line
    assert not list(work_dir.glob("*.pth"))


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [("cut.pth", "it is cut off"), ("list.pth", "is no checkpoint of a segmentation run"), ("no.pth", "No checkpoint")],
)
def test_testing_ends_in_one_line(checkpoint, message, options, place, tmp_path):
    line = one_line("test", [CONFIG, place / checkpoint, "--work-dir", tmp_path / "w", *options], tmp_path)
    assert message in line


def test_the_traceback_on_request(options, tmp_path, monkeypatch):
    arguments = [CONFIG, "--work-dir", tmp_path / "w", *options, "model.decode_head.in_channels=[32,32]"]
    assert "NEPA_TRACEBACK=1 shows the traceback" in one_line("train", arguments, tmp_path)
    status, text = scripts.run("train", arguments, tmp_path / "second", NEPA_TRACEBACK="1")
    assert status == 1 and "Traceback (most recent call last)" in text and "error: " not in text


def test_a_run_that_is_right(options, tmp_path):
    """What the rows change trains as it is, and the mean IoU says what it is a mean of."""
    status, text = scripts.run("train", [CONFIG, "--work-dir", tmp_path / "w", *options], tmp_path / "output")
    assert status == 0 and "error: " not in text and (tmp_path / "w" / "iter_4.pth").is_file()
    assert text.count("The mean IoU is over ") == 2
