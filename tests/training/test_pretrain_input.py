"""What a user may get wrong on the pretraining command: one line that says what and what to do, and nothing written.

Each row is an example of a kind. The command runs in this process, so that a row takes a fraction of a second.
"""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from pretraining import run

from nepa_plugin.checkpoints import save_backbone
from nepa_plugin.methods import NEPA

OPTIONS = [
    # config files
    (["--config", "nothing.yaml"], "No config file at nothing.yaml, and no shipped config of that name."),
    (["--config", "nepa_dmo"], "The nearest: nepa_demo"),
    (["--config", "."], "No config file at ."),
    (["--config", "loop"], "No config file at loop"),
    (["--config", "dangling"], "No config file at dangling"),
    (["--config", "list.yaml"], "list.yaml must hold a mapping of options, not a list."),
    (["--config", "cut.yaml"], "cut.yaml is no YAML file:"),
    (["--config", "binary.yaml"], "binary.yaml is no text in UTF-8"),
    (["--config", "itself.yaml"], "itself.yaml builds on itself"),
    (["--config", "twice.yaml"], "twice.yaml, line 2: the key `seed_everything` is there twice."),
    (
        ["--config", "unknown.yaml"],
        "`trainer.max_epohcs`: no such option; did you mean `trainer.max_epochs`?",
    ),
    (["--config"], "expected one argument"),
    # names of options
    (["--nope"], "config key `model.init_args.nope`: no such option"),
    (["nope"], "unrecognized arguments: nope"),
    (["--data.nope", "1"], "config key `data.nope`: no such option"),
    (["--model.learning_rate", "1"], "config key `model.init_args.learning_rate`: no such option"),
    (["--data.seed", "3"], 'Linked "data.seed" must be given via "seed_everything".'),
    (["--model.num_classes", "5"], "model.num_classes follows from the images' folders: leave it out."),
    # types
    (["--trainer.max_epochs", "x"], "trainer.max_epochs: expected int or null, got x."),
    (["--trainer.precision", "8"], "trainer.precision: expected 64, 32, 16 or"),
    (["--compile", "maybe"], "compile: expected bool, got maybe."),
    (["--seed_everything", "x"], "seed_everything: expected bool or int, got x."),
    (["--model.base_lr", "x"], "base_lr: expected float, got x."),
    (["--model.pool", "median"], "pool: expected 'mean', 'class', got median."),
    (["--model.betas", "[0.9]"], "betas: expected tuple with 2 elements, got [0.9]."),
    (["--model.crop_scale", "0.5"], "crop_scale: expected tuple, got 0.5."),
    (["--data.demo", "cats"], "data.demo: expected 'digits' or null, got cats."),
    (["--data.pipeline", "gpu"], "data.pipeline: expected 'pil', 'tensor', 'device', got gpu."),
    (["--data.num_workers", "x"], "data.num_workers: expected int or null, got x."),
    (["--trainer.callbacks", "nope.Nope"], "trainer.callbacks: No module named 'nope'"),
    # ranges; those of the methods are in tests/methods/test_option_ranges.py
    (["--trainer.max_epochs", "-5"], "trainer.max_epochs must be at least -1, got -5."),
    (["--trainer.max_epochs", "0"], "trainer.max_epochs must be other than 0, got 0."),
    (["--trainer.max_steps", "0"], "trainer.max_steps must be other than 0, got 0."),
    (["--trainer.num_nodes", "0"], "trainer.num_nodes must be at least 1, got 0."),
    (["--trainer.accumulate_grad_batches", "0"], "trainer.accumulate_grad_batches must be at least 1, got 0."),
    (["--trainer.gradient_clip_val", "-1"], "trainer.gradient_clip_val must be at least 0, got -1."),
    (["--trainer.limit_train_batches", "0"], "trainer.limit_train_batches must be greater than 0, got 0."),
    (["--trainer.limit_train_batches", "2.5"], "invalid value 2.5 for limit_train_batches"),
    (["--trainer.check_val_every_n_epoch", "0"], "trainer.check_val_every_n_epoch must be at least 1, got 0."),
    (["--trainer.log_every_n_steps", "0"], "trainer.log_every_n_steps must be at least 1, got 0."),
    (["--trainer.num_sanity_val_steps", "-9"], "trainer.num_sanity_val_steps must be at least -1, got -9."),
    (["--trainer.val_check_interval", "-1"], "invalid value -1 for val_check_interval"),
    (["--trainer.max_time", "soon"], "is not a valid duration"),
    (["--global_batch_size", "0"], "global_batch_size must be at least 1, got 0."),
    (["--global_batch_size", "-128"], "global_batch_size must be at least 1, got -128."),
    (["--global_batch_size", "100"], "global_batch_size 100 is not a multiple of 128 images per device"),
    (["--checkpoint_every_n_steps", "0"], "checkpoint_every_n_steps must be at least 1, got 0."),
    (["--seed_everything", "-1"], "seed_everything: -1 is not in bounds"),
    (["--seed_everything", "99999999999999999999"], "seed_everything: 99999999999999999999 is not in bounds"),
    # devices
    (["--trainer.devices", "0"], "--trainer.devices 0 asks for more than this machine has"),
    (["--trainer.devices", "-3"], "--trainer.devices -3 asks for more than this machine has"),
    (["--trainer.devices", "x"], "--trainer.devices 'x' is no number, no list of GPU indices, and not 'auto'."),
    (["--trainer.devices", "[0,0]"], "--trainer.devices [0, 0] names a device twice."),
    (["--trainer.accelerator", "tpu"], "--trainer.accelerator 'tpu' is none of auto, cuda, gpu, cpu and mps."),
    (["--trainer.strategy", "nope"], "invalid strategy name: `strategy='nope'`"),
    # the run folder
    (["--run_dir", "x" * 300], "File name too long (choose a shorter one)."),
    (["--run_dir", "a\0b"], "--run_dir: 'a\\x00b' has a null byte, which no file system takes."),
    (["--run_dir", "file"], "--run_dir: file cannot be written to: File exists. Choose another folder."),
    (["--run_dir", "file/x"], "--run_dir: file/x cannot be written to: Not a directory. Choose another folder."),
    (["--run_dir", "loop"], "--run_dir: loop cannot be written to: "),
    (["--run_dir", "dangling"], "--run_dir: dangling cannot be written to: "),
    (["--run_dir", "fifo"], "--run_dir: fifo cannot be written to: "),
    (["--run_dir", "/proc/x"], "--run_dir: /proc/x cannot be written to: "),
    (["--run_dir", "images"], "The run folder images exists. Choose another with --run_dir"),
    # checkpoints
    (["--ckpt_path", "last"], "there is no run. Leave the option out to start a new run."),
    (["--ckpt_path", "nothing.ckpt"], "--ckpt_path: no checkpoint at nothing.ckpt."),
    (["--ckpt_path", "fifo"], "--ckpt_path: no checkpoint at fifo."),
    (["--ckpt_path", "images"], "--ckpt_path: no checkpoint at images."),
    (["--ckpt_path", "empty.ckpt"], "empty.ckpt cannot be read as tensors only: it is empty."),
    (["--ckpt_path", "text.ckpt"], "text.ckpt cannot be read as tensors only: it is cut off, damaged, or no file"),
    (["--ckpt_path", "other.ckpt"], "other.ckpt is no checkpoint of a training run."),
    (["--model.init_from", "nothing"], "No checkpoint at nothing: give a folder with config.json"),
    (["--model.init_from", "images"], "images/config.json is missing: a backbone folder holds"),
    (["--model.init_from", "other.ckpt"], "other.ckpt holds no 'state_dict'"),
    (["--model.init_from", "larger"], "larger does not fit NepaViT; nothing was loaded. unexpected: blocks.2."),
    # the model
    (
        ["--model", "Nope"],
        "model: there is no method Nope; the methods are AIM, BEiT, BYOL, CPC, DINO, IBOT, IGPT, IJEPA, LeJEPA",
    ),
    (["--model", "nepa_plugin.methods.Nope"], "model: there is no method nepa_plugin.methods.Nope; the methods are"),
    (["--model", "os.path.join"], "model: there is no method os.path.join; the methods are"),
    (["--model.backbone", "nope"], "backbone='nope' is not a timm model: Unknown model (nope)"),
    (["--model.backbone", "resnet18"], "backbone='resnet18' cannot be built with"),
    (["--model.backbone_args.depth", "0"], "backbone_args.depth must be at least 1, got 0."),
    (["--model.backbone_args.embed_dim", "0"], "backbone_args.embed_dim must be at least 1, got 0."),
    (["--model.backbone_args.num_heads", "7"], "embed_dim=32 must be a multiple of 4 x num_heads=7"),
    (["--model.backbone_args.colour", "1"], "got an unexpected keyword argument 'colour'"),
    (["--model.backbone_args.attention", "sideways"], "attention='sideways' is not one of"),
    (["--model.attention", "sideways"], "attention='sideways' is not one of"),
    (["--model.img_size", "33"], "Image size (33, 33) is not divisible by patch size (4, 4)"),
    (["--model.patch_size", "64"], "Image size (32, 32) is not divisible by patch size (64, 64)"),
    # images
    (["--data.demo", "null"], "data.train_dir is not set: give a folder of images, or --data.demo digits."),
    (["--data.demo", "null", "--data.train_dir", "nothing"], "data.train_dir: no folder at nothing."),
    (["--data.demo", "null", "--data.train_dir", "file"], "data.train_dir: "),
    (["--data.demo", "null", "--data.train_dir", "none"], "data.train_dir: none holds no image."),
    (["--data.demo", "null", "--data.train_dir", "images"], "2 images are fewer than one batch of 128"),
    (["--data.demo", "null", "--data.train_dir", "images", "--data.val_dir", "no"], "data.val_dir: no folder at no."),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    for name, text in {
        "file": "",
        "list.yaml": "[1, 2]",
        "cut.yaml": "a: [1",
        "itself.yaml": "base: itself.yaml",
        "twice.yaml": "seed_everything: 1\nseed_everything: 2\n",
        "unknown.yaml": "trainer: {max_epohcs: 1}",
        "empty.ckpt": "",
        "text.ckpt": "no checkpoint",
    }.items():
        (folder / name).write_text(text)
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    torch.save({"a": 1}, folder / "other.ckpt")
    (folder / "none").mkdir()
    (folder / "images" / "a").mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (32, 32)).save(folder / "images" / "a" / f"{i}.png")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    os.mkfifo(folder / "fifo")
    method = NEPA(4, 0, img_size=32, patch_size=4, backbone_args={"embed_dim": 32, "depth": 3, "num_heads": 2})
    save_backbone(method.backbone, folder / "larger")
    return folder


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[" ".join(options)[:60] for options, _ in OPTIONS])
def test_one_line(options, message, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = {path.name for path in Path().iterdir()}
    folder = [] if "--run_dir" in options else ["--run_dir", "run"]
    run("--trainer.max_steps", "1", "--model.backbone_args.depth", "2", *folder, *options, code=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert {path.name for path in Path().iterdir()} == before


def test_one_process_of_an_unknown_group(place, monkeypatch, capsys):
    """Lightning would start no other process and wait for them."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("LOCAL_RANK", "0")
    run("--run_dir", "run", "--trainer.devices", "2", code=2)
    assert "error: LOCAL_RANK is set and WORLD_SIZE is not" in capsys.readouterr().err
    assert not Path("run").exists()
