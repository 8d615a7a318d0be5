"""The pretraining command as a user runs it."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from pretraining import BASE, ROOT, command, curve, finished, run

import nepa_plugin.methods
from nepa_plugin.training.cli import main


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run of 20 steps that nothing interrupts."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    run("--run_dir", folder)
    return folder


def test_a_run_folder_holds_everything(reference):
    assert {p.name for p in reference.iterdir()} >= {
        *("config.yaml", "metrics.csv", "tensorboard", "checkpoints", "backbone", "loss.png"),
    }
    assert (reference / "checkpoints" / "last.ckpt").is_file()
    config = yaml.safe_load((reference / "config.yaml").read_text())
    assert config["model"]["init_args"]["base_lr"] == 2e-3 and config["seed_everything"] == 1337
    losses = curve(reference)
    assert list(losses) == list(range(20)) and losses[19] < losses[0] < 0
    for name in (
        "lr",
        "grad_norm",
        "images_per_second",
        "embedding_cosine",
        "embedding_effective_rank",
        "copy_baseline",
        "skill",
    ):
        assert curve(reference, name), name
    assert 0 <= curve(reference, "val_online_cls_top1")[19] <= 1
    assert max(curve(reference, "lr").values()) <= 1e-3 + 1e-9


def test_the_summary_says_what_a_comparison_needs(reference):
    summary = json.loads((reference / "summary.json").read_text())
    expected = {
        "method": "NEPA",
        "seed": 1337,
        "train_images": 1400,
        "epochs": 2,
        "steps": 20,
        "images_seen": 20 * 128,
        "global_batch_size": 128,
        "views": 1,
        "encoder_passes": 1,
        "encoder_tokens": 65,
        "discarded_parameters": 0,
        "attention": "causal",
        "exported": "moving average",
        "devices": "1 x cpu",
    }
    assert {key: summary[key] for key in expected} == expected
    assert summary["images_per_second"] == pytest.approx(20 * 128 / summary["seconds"])
    assert 0 < summary["seconds"] < 600 and 5e7 < summary["peak_memory_bytes"] < 5e10


def test_the_exported_backbone_is_the_moving_average(reference):
    checkpoint = torch.load(reference / "checkpoints" / "last.ckpt", weights_only=True)
    model = timm.create_model(f"local-dir:{reference / 'backbone'}", pretrained=True)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, checkpoint["state_dict"]["backbone." + name])
    name = "backbone.patch_embed.proj.weight"
    assert not torch.equal(checkpoint["state_dict"][name], checkpoint["current_model_state"][name])
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(nepa_plugin.load_backbone(reference / "backbone")(images), model.eval()(images))


@pytest.mark.parametrize(("stop", "workers"), [(7, 0), (7, 1), (10, 0)])
def test_resume_is_exact(reference, tmp_path, stop, workers):
    """Also in the middle of an epoch (10 steps each) and at its end."""

    options = ["--checkpoint_every_n_steps", stop, "--data.num_workers", workers]

    class Stop(Exception):
        pass

    original = nepa_plugin.methods.NEPA.on_train_batch_start

    def bomb(self, batch, batch_idx):
        if self.trainer.global_step == stop + 2:  # two steps past the checkpoint, as a SIGKILL would
            raise Stop
        return original(self, batch, batch_idx)

    nepa_plugin.methods.NEPA.on_train_batch_start = bomb
    try:
        with pytest.raises(Stop):
            run("--run_dir", tmp_path / "r", *options)
    finally:
        nepa_plugin.methods.NEPA.on_train_batch_start = original
    before = curve(tmp_path / "r")
    run("--run_dir", tmp_path / "r", "--ckpt_path", "last", *options)
    after = curve(tmp_path / "r")
    assert after == curve(reference)
    assert before.items() <= after.items()  # nothing that was written is lost
    assert (tmp_path / "r" / "config-2.yaml").is_file()
    seen = [json.loads((r / "summary.json").read_text())["images_seen"] for r in (reference, tmp_path / "r")]
    assert seen[0] == seen[1]  # what was trained and lost does not count
    weights = [torch.load(r / "checkpoints" / "last.ckpt", weights_only=True) for r in (reference, tmp_path / "r")]
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(v, weights[1][key][k]) for k, v in weights[0][key].items())


@pytest.mark.slow
@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGKILL])
def test_resume_after_a_signal_is_exact(reference, tmp_path, sig):
    run_dir = tmp_path / "r"
    process = subprocess.Popen(
        command(run_dir, "--checkpoint_every_n_steps", "3", "--trainer.max_epochs", "2"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )
    while process.poll() is None and not (
        (run_dir / "metrics.csv").is_file()
        and len(curve(run_dir)) > 5
        and (run_dir / "checkpoints/last.ckpt").is_file()
    ):
        time.sleep(0.02)
    process.send_signal(sig)
    process.wait(60)
    assert len(curve(run_dir)) < 20, "the run had finished before the signal came"
    assert process.returncode != 0
    run("--run_dir", run_dir, "--ckpt_path", "auto", "--checkpoint_every_n_steps", 3)
    assert curve(run_dir) == curve(reference)


@pytest.mark.slow
def test_two_processes_follow_one(reference, tmp_path):
    """Half the batch on each of two gloo processes, the same order of images."""
    args = ["--trainer.devices", "2", "--data.batch_size_per_device", "64", "--trainer.strategy", "ddp"]
    finished(command(tmp_path / "r", *args))
    single, double = curve(reference), curve(tmp_path / "r")
    assert list(single) == list(double)
    assert max(abs(single[s] - double[s]) for s in single) <= 1e-5
    val = [curve(r, "val_online_cls_top1")[19] for r in (reference, tmp_path / "r")]
    assert val[0] == pytest.approx(val[1], abs=1.1 / 397)  # one image at most by rounding


def test_accumulation_keeps_the_global_batch(reference, tmp_path, caplog):
    caplog.set_level("INFO")
    run("--run_dir", tmp_path / "r", "--data.batch_size_per_device", "32")
    assert "Global batch 128 = 32 per device x 1 device(s) x 4 accumulated" in caplog.text
    losses, single = curve(tmp_path / "r"), curve(reference)
    # 1,400 images are 43 batches of 32, of which 40 make ten whole steps, as they do without accumulation
    assert list(losses) == list(single) == list(range(20)) and losses[19] == pytest.approx(single[19], abs=0.05)
    assert curve(tmp_path / "r", "lr") == curve(reference, "lr")


def test_a_run_shorter_than_its_warm_up(tmp_path):
    with pytest.warns(UserWarning, match="warm-up 500: the warm-up is clamped to 10"):
        run("--run_dir", tmp_path / "r", "--model.warmup_steps", "500")
    assert len(curve(tmp_path / "r")) == 20


@pytest.fixture
def images(tmp_path):
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(140):
            pixels = np.random.default_rng(i).integers(0, 255, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.jpg")
    return tmp_path / "images"


def fails(capsys, run_dir, *args):
    run("--run_dir", run_dir, *args, code=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    assert not Path(run_dir).exists()
    return lines[0]


def test_bad_folders(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("hello")
    new = tmp_path / "run"
    assert "no folder at" in fails(capsys, new, "--data.train_dir", tmp_path / "missing")
    assert "holds no image" in fails(capsys, new, "--data.train_dir", tmp_path / "empty")
    assert "holds no image" in fails(capsys, new, "--data.train_dir", tmp_path / "text")
    assert "data.train_dir is not set" in fails(capsys, new, "--data.demo", "null")


def test_bad_files_are_named_or_skipped(images, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    whole = (images / "a" / "0.jpg").read_bytes()
    (images / "a" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "b" / "text.png").write_text("not an image")
    message = fails(capsys, tmp_path / "run", "--data.train_dir", images)
    assert "2 file(s) cannot be read" in message and "cut.jpg" in message and "text.png" in message
    run("--run_dir", tmp_path / "run", "--data.train_dir", images, "--data.on_bad_image", "skip")
    assert "Skipped 2 file(s)" in caplog.text
    assert len(curve(tmp_path / "run")) == 4  # 280 images, two batches of 128 in each of two epochs


def test_flat_folder_without_labels(images, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (images / "a").iterdir():
        file.rename(flat / file.name)
    run("--run_dir", tmp_path / "run", "--data.train_dir", flat)
    assert len(curve(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.init_args.base_lrr", "1"], "did you mean `model.init_args.base_lr`?"),
        (["--model.shfit", "false"], "did you mean `model.init_args.shift`?"),
        (["--trainer.max_epohcs", "1"], "did you mean `trainer.max_epochs`?"),
        (["--model.img_size", "30"], "not divisible by patch size (4, 4)"),
        (["--model.init_from", str(ROOT / "tests/data/nepa-toy-gelu")], "does not fit"),
        (["--trainer.devices", "4096"], "more than this machine has"),
        (["--data.batch_size_per_device", "100"], "global_batch_size 128 is not a multiple"),
        (["--ckpt_path", "last"], "there is no"),
        (["--ckpt_path", "nothing.ckpt"], "no checkpoint at"),
        (["--global_batch_size", "4096", "--data.batch_size_per_device", "2048"], "fewer than one batch"),
    ],
)
def test_bad_options(args, message, tmp_path, capsys):
    assert message in fails(capsys, tmp_path / "run", *args)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(tmp_path, capsys):
    assert "no CUDA device is available" in fails(capsys, tmp_path / "run", "--trainer.accelerator", "cuda")


def test_unknown_key_in_a_config_file(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("trainer:\n  max_epohcs: 3\n")
    assert "did you mean `trainer.max_epochs`?" in fails(capsys, tmp_path / "run", "--config", tmp_path / "c.yaml")


def test_an_existing_run_is_not_overwritten(reference, capsys):
    before = {p: p.read_bytes() for p in reference.rglob("*") if p.is_file()}
    run("--run_dir", reference, code=2)
    assert "exists. Choose another with --run_dir" in capsys.readouterr().err
    run("--run_dir", reference, "--ckpt_path", "last", "--model.backbone_args.embed_dim", "64", code=2)
    assert "does not fit" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in reference.rglob("*") if p.is_file()} == before


def test_print_config_and_help(capsys):
    run("--print_config", code=0)
    assert yaml.safe_load(capsys.readouterr().out)["global_batch_size"] == 128
    run("--help", code=0)
    text = capsys.readouterr().out
    assert "--run_dir" in text and "Folder of training images" in text
    run("--model.help", code=0)
    assert "Decay of the moving average" in capsys.readouterr().out


CONFIG_NAMES = sorted(path.stem for path in (ROOT / "lightly_configs").glob("*.yaml") if path.stem != "base")


@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_configs_parse(name, capsys, tmp_path):
    with pytest.raises(SystemExit) as done:
        main(
            [
                "--config",
                str(ROOT / f"lightly_configs/{name}.yaml"),
                "--data.train_dir",
                str(tmp_path),
                "--print_config",
            ],
            BASE,
        )
    assert done.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    digits = name.endswith(("_digits", "_demo"))
    assert config["data"]["demo"] == ("digits" if digits else None)
    sizes = config["model"]["init_args"]["backbone_args"] or {}
    assert sizes.get("embed_dim") == ({"nepa_demo": 128}.get(name, 64) if digits else None)
    if name.startswith("nepa_vit"):
        assert config["global_batch_size"] == 4096 and config["trainer"]["max_epochs"] == 1600
        recipe = config["model"]["init_args"]
        assert (recipe["base_lr"], recipe["warmup_fraction"], recipe["ema_decay"]) == (3e-4, 0.025, None)
