"""``nepa finetune``: the protocol of ``evaluate`` in a run folder, which goes on exactly, on one device or several."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pretraining import ROOT, curve, finished
from torch.nn.functional import layer_norm

import nepa_plugin
from nepa_plugin.checkpoints import class_names, read_tensors
from nepa_plugin.data.evaluation import ImageFormat
from nepa_plugin.evaluation import EvaluationOptions, FinetuneOptions, evaluate
from nepa_plugin.finetuning import Recipe
from nepa_plugin.training.configs import read_config
from nepa_plugin.training.finetune import base_config, expand, main

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SHORT = [
    *("--global_batch_size", "16", "--data.batch_size_per_device", "16", "--trainer.max_epochs", "3"),
    *("--trainer.log_every_n_steps", "1", "--trainer.enable_model_summary", "false", "--data.num_workers", "0"),
    *("--model.lr", "0.02", "--model.head_lr", "0.02", "--seed_everything", "3"),
]
#: Nothing that depends on the process: dropped paths, mixtures, the rescaled RoPE is one for all.
PLAIN = ["--model.drop_path_rate", "0", "--model.mixup", "0", "--model.cutmix", "0"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small are fastest so, by far where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def backbone(folder, name="nepa_vit_tiny_patch14_224"):
    torch.manual_seed(0)
    return nepa_plugin.save_backbone(timm.create_model(name, **SIZES), folder)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return backbone(tmp_path_factory.mktemp("start") / "backbone")


def arguments(start, images, run_dir, *more):
    return [str(start), "--data", str(images), "--run_dir", str(run_dir), *SHORT, *map(str, more)]


def run(start, images, run_dir, *more, code=None):
    if code is None:
        return main(arguments(start, images, run_dir, *more), base_config())
    with pytest.raises(SystemExit) as error:
        main(arguments(start, images, run_dir, *more), base_config())
    assert error.value.code == code
    return None


def tuned(run_dir):
    return nepa_plugin.load_backbone(Path(run_dir) / "finetuned")


def summary(run_dir):
    return json.loads((Path(run_dir) / "summary.json").read_text())


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def whole(start, three_digits, tmp_path_factory):
    """A run that was never stopped, with all of the published augmentation."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(start, three_digits, folder)
    return folder


def test_the_command_and_the_protocol_are_one(whole, start, three_digits, tmp_path):
    options = FinetuneOptions(epochs=3, batch_size=16, lr=0.02, head_lr=0.02)
    options = EvaluationOptions(accelerator="cpu", seed=3, num_workers=0, finetune=options)
    entry = evaluate(start, three_digits, ["finetune"], options, tmp_path)["protocols"]["finetune"]
    assert {name: summary(whole)[name] for name in ("top1", "top3", "ema_decay")} == pytest.approx(
        {name: entry[name] for name in ("top1", "top3", "ema_decay")}
    )
    assert_same(tuned(whole).state_dict(), nepa_plugin.load_backbone(tmp_path / "finetuned").state_dict())


def test_what_a_run_leaves_behind(whole, three_digits, start):
    said = summary(whole)
    assert (said["method"], said["epochs"], said["steps"], said["images_seen"]) == ("fine-tuning", 3, 9, 144)
    assert said["train_images"] == 61 and said["global_batch_size"] == 16 and said["init_from"] == str(start)
    assert said["attention"] == "bidirectional" and said["recipe"]["layer_decay"] == 0.65
    scores = curve(whole, "val_top1")
    assert len(scores) == 3 and said["top1"] == pytest.approx(100 * scores[max(scores)], abs=1e-4)
    assert (whole / "loss.png").is_file() and (whole / "config.yaml").is_file()
    # in three lines, by timm
    model = timm.create_model(f"local-dir:{whole / 'finetuned'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images), tuned(whole)(images))
    assert class_names(model) == ["0", "1", "2"] and model.blocks[0].attn.q_norm.weight is not None
    options = EvaluationOptions(accelerator="cpu", num_workers=0)
    scored = evaluate(whole / "finetuned", three_digits, ["head"], options)["protocols"]["head"]
    assert scored["top1"] == pytest.approx(said["top1"], abs=1e-4)


def test_the_logged_learning_rates_are_those_in_force(whole):
    """Two groups of nine steps, whose warm-up is 1.8 steps for the layers before the last block and one for it."""
    peak = 0.02 * 16 / 256
    expected = {0: 1 / 2, **{step: 0.5 * (1 + math.cos(math.pi * (step - 1) / 8)) for step in range(1, 9)}}
    assert curve(whole, "lr") == pytest.approx({step: peak * value for step, value in expected.items()}, rel=1e-6)
    assert curve(whole, "head_lr") == pytest.approx({s: 0.02 * value for s, value in expected.items()}, rel=1e-6)


def stopped_and_resumed(start, images, folder, *options):
    with pytest.raises(KeyError, match="here"):
        run(start, images, folder, *options, "--trainer.callbacks+=recording.Stops")
    saved = read_tensors(folder / "checkpoints" / "last.ckpt")["global_step"]
    run(start, images, folder, *options, "--ckpt_path", "last")
    return saved


@pytest.mark.parametrize(("every", "saved"), [("2", 4), ("100", 3)])
def test_a_run_goes_on_exactly(whole, start, three_digits, tmp_path, every, saved):
    """From the middle of an epoch, and from the end of one."""
    folder = tmp_path / "run"
    assert stopped_and_resumed(start, three_digits, folder, "--checkpoint_every_n_steps", every) == saved
    assert curve(folder) == curve(whole) and curve(folder, "val_top1") == curve(whole, "val_top1")
    assert_same(tuned(folder).state_dict(), tuned(whole).state_dict())
    same = ("top1", "top3", "ema_decay", "steps", "images_seen")
    assert {name: summary(folder)[name] for name in same} == {name: summary(whole)[name] for name in same}


def test_a_finished_run_that_is_started_again_says_the_same(whole, start, three_digits, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "finetuned")
    run(start, three_digits, folder, "--ckpt_path", "last")
    assert summary(folder)["top1"] == summary(whole)["top1"]
    assert_same(tuned(folder).state_dict(), tuned(whole).state_dict())


def test_the_best_epoch_survives_a_stop(start, three_digits, tmp_path):
    """A learning rate that spoils what was learned, so that the best epoch is not the last."""
    options = ["--model.select", "best", "--model.ema_decay", "0", "--model.warmup_fraction", "0"]
    options += ["--model.lr", "2", "--model.head_lr", "0.5", "--checkpoint_every_n_steps", "2", *PLAIN]
    run(start, three_digits, tmp_path / "whole", *options)
    assert stopped_and_resumed(start, three_digits, tmp_path / "run", *options) == 4
    said = summary(tmp_path / "run")
    scores = list(curve(tmp_path / "whole", "val_top1").values())
    assert said["top1"] == pytest.approx(100 * max(scores), abs=1e-4)
    assert said["best_epoch"] == 1 + scores.index(max(scores))
    assert said["last_top1"] == pytest.approx(100 * scores[-1], abs=1e-4)
    assert_same(tuned(tmp_path / "run").state_dict(), tuned(tmp_path / "whole").state_dict())
    options = EvaluationOptions(accelerator="cpu", num_workers=0)
    scored = evaluate(tmp_path / "run" / "finetuned", three_digits, ["head"], options)["protocols"]["head"]
    assert scored["top1"] == pytest.approx(said["top1"], abs=1e-4)


def test_other_options_are_in_force_and_said(whole, start, three_digits, tmp_path):
    last = whole / "checkpoints" / "last.ckpt"
    with pytest.warns(UserWarning, match="steps 12 instead of 9, warm-up steps 2.4 instead of 1.8, learning rate"):
        run(
            start,
            three_digits,
            tmp_path / "run",
            "--ckpt_path",
            last,
            "--trainer.max_epochs",
            "4",
            "--model.lr",
            "0.04",
        )
    expected = [0.04 * 16 / 256 * 0.5 * (1 + math.cos(math.pi * (step - 1) / 11)) for step in (9, 10, 11)]
    assert list(curve(tmp_path / "run", "lr").values()) == pytest.approx(expected, rel=1e-6)


def test_accumulated_batches_are_one(start, three_digits, tmp_path):
    """As many images per step, the same learning rate and the same weights."""
    run(start, three_digits, tmp_path / "one", *PLAIN)
    run(start, three_digits, tmp_path / "two", *PLAIN, "--data.batch_size_per_device", "8")
    assert curve(tmp_path / "one", "lr") == curve(tmp_path / "two", "lr")
    # RoPE's rescaling is drawn once per forward pass, so the two halves of a step have two
    assert len(curve(tmp_path / "two")) == len(curve(tmp_path / "one")) == 9
    assert summary(tmp_path / "two")["images_seen"] == summary(tmp_path / "one")["images_seen"] == 144


@pytest.mark.slow
def test_two_processes_follow_one(start, three_digits, tmp_path):
    """Half the batch each: the same steps and, as 29 images are shared unevenly, every image scored once."""
    options = [*PLAIN, "--model.random_erasing", "0", "--trainer.accelerator", "cpu"]
    run(start, three_digits, tmp_path / "one", *options)
    half = ["--data.batch_size_per_device", "8", "--trainer.devices", "2"]
    command = [sys.executable, str(ROOT / "tools" / "finetune.py")]
    finished([*command, *arguments(start, three_digits, tmp_path / "two", *options, *half)], OMP_NUM_THREADS="1")
    assert summary(tmp_path / "two")["devices"] == "2 x cpu"
    for name in ("train_loss", "lr", "val_top1"):
        one, two = (curve(tmp_path / run_dir, name) for run_dir in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
    hits = summary(tmp_path / "two")["top1"] * 29 / 100
    assert hits == pytest.approx(round(hits), abs=1e-3)
    for name, value in tuned(tmp_path / "one").state_dict().items():
        torch.testing.assert_close(tuned(tmp_path / "two").state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_any_vit_becomes_a_classifier_in_three_lines(three_digits, tmp_path):
    source = backbone(tmp_path / "plain", "plain_vit_tiny_patch14_224")
    run(source, three_digits, tmp_path / "run", "--trainer.max_epochs", "1", "--checkpoint_every_n_steps", "1")
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'finetuned'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = model.backbone.forward_features(images)
        pooled = layer_norm(tokens[:, 1:].mean(1), (32,), model.fc_norm.weight, model.fc_norm.bias, eps=1e-12)
        torch.testing.assert_close(model(images), pooled @ model.head.weight.T + model.head.bias)
        assert torch.equal(tuned(tmp_path / "run")(images), model(images))
    assert class_names(model) == class_names(tuned(tmp_path / "run")) == ["0", "1", "2"]
    options = EvaluationOptions(accelerator="cpu", num_workers=0)
    scored = evaluate(tmp_path / "run" / "finetuned", three_digits, ["head", "knn"], options)["protocols"]
    assert scored["head"]["top1"] == pytest.approx(summary(tmp_path / "run")["top1"], abs=1e-4)
    # and again, from the classifier: the head is new, the network inside the same
    run(tmp_path / "run" / "finetuned", three_digits, tmp_path / "again", "--trainer.max_steps", "1")
    assert tuned(tmp_path / "again").backbone.pretrained_cfg["architecture"] == "plain_vit_tiny_patch14_224"


def test_from_scratch(start, three_digits, tmp_path):
    """The architecture of a checkpoint or of a name, and nothing of the weights."""
    options = ["--model.backbone", start, "--model.lr", "1e-30", "--model.head_lr", "1e-30", "--trainer.max_steps", "1"]
    run("none", three_digits, tmp_path / "run", *options)
    fresh, given = tuned(tmp_path / "run").state_dict(), nepa_plugin.load_backbone(start).state_dict()
    assert summary(tmp_path / "run")["init_from"] is None
    assert not torch.equal(fresh["blocks.0.attn.qkv.weight"], given["blocks.0.attn.qkv.weight"])
    named = json.dumps(SIZES)
    options[1:2] = ["nepa_vit_tiny_patch14_224", "--model.backbone_args", named]
    run("none", three_digits, tmp_path / "named", *options)
    assert_same(fresh, tuned(tmp_path / "named").state_dict())  # one seed


def test_bfloat16_and_recomputed_activations(whole, start, three_digits, tmp_path):
    """What is meant for the GPU runs here, too: nearly the same losses, and weights in float32."""
    options = ["--trainer.precision", "bf16-mixed", "--model.grad_checkpointing", "true", "--trainer.max_epochs", "1"]
    run(start, three_digits, tmp_path / "run", *options)
    assert summary(tmp_path / "run")["precision"] == "bf16-mixed"
    expected = {step: loss for step, loss in curve(whole).items() if step < 3}
    assert curve(tmp_path / "run") == pytest.approx(expected, abs=0.02)
    assert all(value.dtype == torch.float32 for value in tuned(tmp_path / "run").state_dict().values())


def test_the_last_weights_are_scored_where_no_epoch_ends(start, three_digits, tmp_path):
    run(start, three_digits, tmp_path / "run", "--trainer.max_steps", "4", "--trainer.check_val_every_n_epoch", "2")
    options = EvaluationOptions(accelerator="cpu", num_workers=0)
    scored = evaluate(tmp_path / "run" / "finetuned", three_digits, ["head"], options)["protocols"]["head"]
    assert summary(tmp_path / "run")["top1"] == pytest.approx(scored["top1"], abs=1e-4)


def test_without_validation_images_there_is_no_score(start, three_digits, tmp_path, capsys):
    alone = [str(start), "--data.train_dir", str(three_digits / "train"), *SHORT, "--trainer.max_steps", "1"]
    main([*alone, "--run_dir", str(tmp_path / "run")], base_config())
    assert "top1" not in summary(tmp_path / "run") and tuned(tmp_path / "run").num_classes == 3
    with pytest.raises(SystemExit):
        main([*alone, "--run_dir", str(tmp_path / "best"), "--model.select", "best"], base_config())
    assert "model.select best needs validation images" in capsys.readouterr().err
    assert not (tmp_path / "best").exists()


def test_a_diverged_run_says_so_and_keeps_what_it_had(start, three_digits, tmp_path, capsys):
    hot = [
        "--model.lr",
        "1e30",
        "--model.head_lr",
        "1e30",
        "--model.warmup_fraction",
        "0",
        "--model.clip_grad_norm",
        "0",
    ]
    run(start, three_digits, tmp_path / "run", *hot, code=1)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "Training has diverged" in error[0] and "Lower lr (now 1e+30)" in error[0]
    assert not (tmp_path / "run" / "finetuned").exists() and not (tmp_path / "run" / "summary.json").exists()


BAD = [
    (["--model.layer_decay", "0"], "model.layer_decay must be in (0, 1], got 0.0."),
    (["--model.select", "first"], "model.select"),
    (["--model.layr_decay", "1"], "config key `model.layr_decay`: no such option; did you mean `model.layer_decay`?"),
    (["--model.auto_augment", "random"], "model.auto_augment 'random' is none of timm's policies"),
    (["--data.batch_size_per_device", "15", "--global_batch_size", "15"], "is odd, and mixup takes images in pairs"),
    (["--data.batch_size_per_device", "64", "--global_batch_size", "64"], "61 images are fewer than one batch of 64"),
    (["--data.crop_pct", "2"], "data.crop_pct must be in (0, 1], got 2.0."),
    (["--trainer.strategy", "fsdp"], "fine-tuning keeps the weights whole, with ddp"),
    (["--model.backbone", "nepa_vit_tiny_patch14_224"], "model.backbone is for training from scratch"),
    (["--data.train_dir", "x"], "data.folder and data.train_dir are both set"),
    (["--ckpt_path", "last"], "there is no run"),
    (["--config", "vit_digit"], "The nearest: vit_digits"),
    (["--global_batch_size", "17"], "global_batch_size 17 is not a multiple of 16"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[" ".join(options) for options, _ in BAD])
def test_bad_options_are_one_line(options, message, start, three_digits, tmp_path, capsys):
    run(start, three_digits, tmp_path / "run", *options, code=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["gone", "--data", "{images}"], "gone"),
        (["{start}"], "No images: give --data FOLDER"),
        (["{start}", "--data", "gone"], "--data: there is no folder gone."),
        (["{start}", "--data", "{images}/train"], "train/train. Give a folder of images"),
        (["--data", "{images}"], "There is nothing to fine-tune: give a checkpoint first"),
        (["none", "--data", "{images}"], "train from scratch with `finetune none --model.backbone"),
    ],
)
def test_what_there_is_not_is_one_line(command, message, start, three_digits, tmp_path, capsys):
    given = [part.format(start=start, images=three_digits) for part in command]
    with pytest.raises(SystemExit) as error:
        main([*given, "--run_dir", str(tmp_path / "run"), *SHORT], base_config())
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert error.value.code == 2 and len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "run").exists()


def test_the_command_line_in_full():
    assert expand(["a/b", "--data", "c", "--x=1"]) == ["--model.init_from", "a/b", "--data.folder", "c", "--x=1"]
    assert expand(["none", "--data=c"]) == ["--data.folder=c"] and expand(["--data.folder", "c"]) == [
        "--data.folder",
        "c",
    ]


@pytest.mark.parametrize("name", ["vit_b_imagenet", "vit_l_imagenet", "vit_digits", "vit_cifar10"])
def test_shipped_configs_are_accepted(name, start, tmp_path, capsys):
    """All but the images is there: what is missed is the folder, in one line."""
    with pytest.raises(SystemExit) as error:
        main([str(start), "--data", "gone", "--config", name, "--run_dir", str(tmp_path / "run")], base_config())
    assert error.value.code == 2 and "there is no folder gone" in capsys.readouterr().err


def test_the_published_recipes():
    """RECIPES of ViT-B and ViT-L, with what both have in common as the defaults."""
    base, large = (read_config(name, "lightly_configs/finetune") for name in ("vit_b_imagenet", "vit_l_imagenet"))
    published = {"lr": 1.5e-3, "head_lr": 1e-3, "layer_decay": 0.65, "warmup_fraction": 0.2, "drop_path_rate": 0.1}
    assert base["model"] == published == {name: getattr(Recipe(), name) for name in published}
    assert large["model"] == published | {
        "lr": 1e-3,
        "layer_decay": 0.75,
        "warmup_fraction": 0.3,
        "drop_path_rate": 0.2,
    }
    assert all((c["global_batch_size"], c["trainer"]["max_epochs"]) == (1024, 100) for c in (base, large))
    common = Recipe()
    assert (common.betas, common.weight_decay, common.clip_grad_norm) == ((0.9, 0.999), 0.05, 1.0)
    assert (common.mixup, common.cutmix, common.mixup_switch_prob, common.label_smoothing) == (0.8, 1.0, 0.5, 0.1)
    assert (common.auto_augment, common.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert common.freeze_patch_embed and common.attention == "bidirectional" and common.qk_norm_affine
    model = timm.create_model("nepa_vit_large_patch14_224", depth=1)
    form = ImageFormat.of(model, large["data"]["crop_pct"], large["data"]["crop_mode"])
    evaluation: Any = form.evaluation()
    assert evaluation.transforms[0].size == [235, 235]  # int(224 / 0.95), both sides
