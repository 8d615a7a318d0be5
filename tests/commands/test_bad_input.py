"""What the commands refuse, and in which words: one line on stderr, status 2, before anything is written."""

import importlib
import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from refusal import refusal
from safetensors.torch import save_file

import nepa_command
import nepa_plugin

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


def image_tree(root, seed=0):
    rng = np.random.default_rng(seed)
    for split, count in (("train", 3), ("val", 2)):
        for label in "ab":
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                picture = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
                picture.save(root / split / label / f"{i}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of good and bad things of which the rows below speak; nothing may be added to it."""
    root = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    model = timm.create_model("nepa_vit_tiny_patch14_224", **SIZES)
    nepa_plugin.save_backbone(model, root / "backbone")
    plain = timm.create_model("plain_vit_tiny_patch14_224", **SIZES)
    nepa_plugin.save_backbone(plain, root / "plain")
    model.reset_classifier(2)
    nepa_plugin.save_backbone(model, root / "classifier")
    model.reset_classifier(0, "")
    image_tree(root / "images")

    for name in ("one_class", "no_val", "flat", "other_classes", "damaged", "empty_class"):
        shutil.copytree(root / "images", root / name)
    for split in ("train", "val"):
        shutil.rmtree(root / "one_class" / split / "b")
        shutil.rmtree(root / "flat" / split)
        (root / "flat" / split).mkdir()
        shutil.copy(root / "images" / split / "a" / "0.png", root / "flat" / split)
    shutil.rmtree(root / "no_val" / "val")
    (root / "other_classes" / "val" / "b").rename(root / "other_classes" / "val" / "c")
    (root / "damaged" / "train" / "a" / "1.png").write_bytes(b"\x89PNG")
    shutil.rmtree(root / "empty_class" / "val" / "b")
    (root / "empty_class" / "val" / "b").mkdir()
    (root / "links" / "train" / "a").mkdir(parents=True)
    shutil.copytree(root / "images" / "val", root / "links" / "val")
    (root / "links" / "train" / "a" / "again").symlink_to("..", target_is_directory=True)
    (root / "empty").mkdir()
    (root / "file").write_text("a file")
    (root / "dead").symlink_to("nowhere")

    for name in ("no_weights", "no_config", "half", "not_finite", "text"):
        shutil.copytree(root / "backbone", root / name)
    (root / "no_weights" / "model.safetensors").unlink()
    (root / "no_config" / "config.json").unlink()
    whole = (root / "half" / "model.safetensors").read_bytes()
    (root / "half" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    (root / "text" / "config.json").write_text("{")
    save_file(
        {k: v.fill_(float("nan")) if v.ndim > 1 else v for k, v in model.state_dict().items()},
        root / "not_finite" / "model.safetensors",
    )

    (root / "twice.yaml").write_text("k: 5\ntemperature: 0.1\nk: 7\n")
    (root / "list.yaml").write_text("- 1\n")
    (root / "broken.yaml").write_text("k: [1\n")
    (root / "unknown.yaml").write_text("neighbours: 5\n")
    (root / "loop.yaml").write_text("base: loop.yaml\n")
    (root / "nepa.yaml").write_text("base: nepa_digits\n")

    for name, text in (("cut", "{"), ("list", "[1]"), ("keys", "{}"), ("type", '{"backbone": 1}')):
        (root / f"results_{name}").mkdir()
        (root / f"results_{name}" / "results.json").write_text(text)
    for name, text in (("cut", "{"), ("keys", "{}"), ("type", json.dumps({"seed": "0"}))):
        shutil.copytree(root / "backbone", root / f"run_{name}" / "backbone")
        (root / f"run_{name}" / "summary.json").write_text(text)
    (root / "unfinished").mkdir()
    for name, text in (("request", "{"), ("other_request", '{"arguments": [], "config": {}}')):
        (root / name / "nepa").mkdir(parents=True)
        (root / name / "nepa" / "seed0.request.json").write_text(text)
    (root / "foreign" / "nepa" / "seed0").mkdir(parents=True)

    (root / "tars").mkdir()
    (root / "tars" / "0.tar").write_bytes(b"no tar file at all" * 100)
    return root


EVALUATE = "evaluate {backbone} --data {images} "
COMPARE = "compare {nepa.yaml} --data {images} --seeds 0 --evaluate knn --k 2 --out {new} "
VISUALIZE = "visualize {backbone} --data {images} --out {new}.png "
BENCHMARK = "benchmark --model tiny --img-size 28 --depth 1 --batch-size 2 --accelerator cpu --steps 1 --warmup 1 "

ROWS = [
    # -- evaluate: options
    ("evaluate", "the following arguments are required: backbone, data"),
    (EVALUATE + "--protcol knn", "unrecognized arguments: --protcol"),
    (EVALUATE + "--protocol knm", "give one or several of knn, linear, attentive, finetune, readout, head."),
    (EVALUATE + "--protocol ,", "protocol missing: give one or several of knn"),
    (EVALUATE + "--k 0", "k must be at least 1, got 0."),
    (EVALUATE + "--k many", 'Parser key "k"'),
    (EVALUATE + "--k 7", "k = 7 neighbours, but only 6 training images: lower k."),
    (EVALUATE + "--k 2 --temperature 0", "temperature must be at least 0.0125, got 0.0."),
    (EVALUATE + "--k 2 --temperature -1", "temperature must be at least 0.0125, got -1.0."),
    (EVALUATE + "--k 2 --temperature nan", 'Parser key "temperature": Expected a'),
    (EVALUATE + "--k 2 --concat 0", "concat must be at least 1, got 0."),
    (EVALUATE + "--k 2 --crop_pct 0", "crop_pct must be in (0, 1], got 0.0."),
    (EVALUATE + "--k 2 --crop_pct 1.5", "crop_pct must be in (0, 1], got 1.5."),
    (EVALUATE + "--k 2 --batch_size 0", "batch_size must be at least 1, got 0."),
    (EVALUATE + "--k 2 --num_workers -1", "num_workers must be at least 0, got -1."),
    (EVALUATE + "--k 2 --seed -1", "seed must be in [0, "),
    (EVALUATE + "--k 2 --max_image_pixels 0", "max_image_pixels must be at least 1, got 0."),
    (EVALUATE + "--k 2 --max_image_pixels 255", "0.png (256 pixels, more than max_image_pixels 255)"),
    (
        EVALUATE + "--k 2 --depth 'block 9'",
        "depth 'block 9' is not one of this model's: embedding, block 1, final norm.",
    ),
    (EVALUATE + "--k 2 --pool class", "pool 'class': this model's features are last, mean."),
    (EVALUATE + "--k 2 --pool middle", 'Parser key "pool"'),
    (EVALUATE + "--k 2 --devices 999", "--devices 999 asks for more than this machine has"),
    (EVALUATE + "--k 2 --devices 0", "--devices"),
    (EVALUATE + "--k 2 --accelerator npu", "accelerator"),
    (EVALUATE + "--k 2 --model_args.depth -1", "depth"),
    (EVALUATE + "--k 2 --model_args.no_such 1", "no_such"),
    (EVALUATE + "--k 2 --model_args 7", 'Parser key "model_args"'),
    (EVALUATE + "--linear.epochs 0", "linear.epochs must be at least 1, got 0."),
    (EVALUATE + "--linear.weight_decay -0.1", "linear.weight_decay must be at least 0, got -0.1."),
    (EVALUATE + "--linear.hflip_prob 7", "linear.hflip_prob must be in [0, 1], got 7.0."),
    (EVALUATE + "--linear.crop_scale [0,0]", "linear.crop_scale[0] must be in (0, 1], got 0.0."),
    (EVALUATE + "--linear.crop_scale [0.9,0.1]", "linear.crop_scale must be in order, got [0.9, 0.1]."),
    (EVALUATE + "--linear.C 0", "linear.C must be greater than 0, got 0.0."),
    (EVALUATE + "--linear.solver newton", 'Parser key "linear.solver"'),
    (EVALUATE + "--attentive.epochs 0", "attentive.epochs must be at least 1, got 0."),
    (EVALUATE + "--k 2 --protocol attentive --attentive.num_heads 3", "3 heads do not divide 32 channels."),
    (EVALUATE + "--attentive.warmup_fraction 2", "attentive.warmup_fraction must be in [0, 1], got 2.0."),
    (EVALUATE + "--finetune.clip_grad_norm -1", "finetune.clip_grad_norm must be at least 0, got -1.0."),
    (EVALUATE + "--finetune.auto_augment random", "finetune.auto_augment 'random' is none of timm's policies"),
    (EVALUATE + "--finetune.accumulate 3", "finetune.accumulate 3 does not divide finetune.batch_size 1024."),
    (EVALUATE + "--finetune.ema_decay 1", "finetune.ema_decay must be in [0, 1), got 1.0."),
    (EVALUATE + "--config {twice.yaml}", "twice.yaml, line 3: the key `k` is there twice. Remove one of them."),
    (EVALUATE + "--config {list.yaml}", "Unexpected config: - 1"),
    (EVALUATE + "--config {broken.yaml}", "broken.yaml is no YAML file"),
    (EVALUATE + "--config {unknown.yaml}", "neighbours"),
    (EVALUATE + "--config {nowhere.yaml}", "nowhere.yaml"),
    # -- evaluate: images
    ("evaluate {backbone} --data {nowhere}", "training images: no folder at {nowhere}/train."),
    ("evaluate {backbone} --data {file}", "training images: no folder at {file}/train."),
    ("evaluate {backbone} --data {empty}", "training images: no folder at {empty}/train."),
    ("evaluate {backbone} --data {dead}", "training images: no folder at {dead}/train."),
    ("evaluate {backbone} --data " + "x" * 300, "File name too long (choose a shorter one)."),
    ("evaluate {backbone} --data {no_val}", "validation images: no folder at {no_val}/val."),
    ("evaluate {backbone} --data {flat}", "{flat}/train has no classes: evaluation needs one sub-folder per class."),
    ("evaluate {backbone} --data {one_class}", "{one_class}/train has one class only, a"),
    ("evaluate {backbone} --data {other_classes}", "have different classes: b, c only in one of them."),
    (
        "evaluate {backbone} --data {empty_class}",
        "validation images: {empty_class}/val cannot be read as an image folder",
    ),
    ("evaluate {backbone} --data {damaged}", "1 file(s) cannot be read as images: {damaged}/train/a/1.png (damaged)."),
    ("evaluate {backbone} --data {links}", "again is a link to a folder that it is in. Remove the link."),
    # -- evaluate: backbones
    ("evaluate {nowhere} --data {images} --k 2", "No checkpoint at {nowhere}"),
    ("evaluate {empty} --data {images} --k 2", "{empty}"),
    ("evaluate {file} --data {images} --k 2", "{file}"),
    ("evaluate {no_weights} --data {images} --k 2", "model.safetensors is missing"),
    ("evaluate {no_config} --data {images} --k 2", "config.json is missing"),
    ("evaluate {half} --data {images} --k 2", "{half}"),
    ("evaluate {text} --data {images} --k 2", "{text}"),
    ("evaluate {not_finite} --data {images} --k 2", "{not_finite}"),
    ("evaluate nepa_vit_tiny_patch14_224 --data {images} --k 2", "timm has no weights of nepa_vit_tiny_patch14_224"),
    # -- evaluate: results
    (EVALUATE + "--k 2 --out {file}", "--out {file}: it is no folder."),
    (EVALUATE + "--k 2 --out {file}/deeper", "--out {file}/deeper: Not a directory."),
    (EVALUATE + "--k 2 --out {dead}", "--out {dead}: it is a link to nothing."),
    (EVALUATE + "--k 2 --out " + "x" * 300, "File name too long (choose a shorter one)."),
    (EVALUATE + "--k 2 --out /proc/results", "--out /proc/results: "),
    (EVALUATE + "--k 2 --out {results_cut}", "results.json is damaged: "),
    (EVALUATE + "--k 2 --out {results_list}", "results.json is damaged: it holds no mapping but a list. Remove it, or"),
    (EVALUATE + "--k 2 --out {results_keys}", "results.json is damaged: it has no 'backbone'. Remove it, or"),
    (EVALUATE + "--k 2 --out {results_type}", "results.json is damaged: its 'backbone' is a int. Remove it, or"),
    # -- compare
    ("compare", "the following arguments are required: CONFIG, --data"),
    (COMPARE + "--seds 1", "unrecognized arguments: --seds 1"),
    (COMPARE + "--jobs 0", "jobs must be at least 1, got 0."),
    (COMPARE + "--jobs two", "argument --jobs: invalid int value: 'two'"),
    (COMPARE + "--seeds -1", "seeds[0] must be in [0, "),
    (COMPARE + "--seeds 0 0", "seeds: give one or several, each once, got [0, 0]."),
    (COMPARE + "--k 0", "k must be at least 1, got 0."),
    (COMPARE + "--evaluate knm", "protocol knm: give one or several of knn"),
    (COMPARE + "--out {file}", "--out {file}: it is no folder."),
    (COMPARE + "--out {request}", "{request}/nepa/seed0.request.json is damaged: "),
    (
        COMPARE + "--out {other_request}",
        "{other_request}/nepa/seed0: trained with another config or other options than now",
    ),
    (COMPARE + "--out {foreign}", "{foreign}/nepa/seed0 is not part of a comparison: choose another --out."),
    (COMPARE + "-- --trainer.max_epohcs 1", "config key `trainer.max_epohcs`: no such option; did you mean"),
    (COMPARE + "-- --trainer.max_epochs 0", "max_epochs must be other than 0, got 0"),
    (COMPARE + "-- --model.base_lr -1", "base_lr must be"),
    ("compare {nowhere.yaml} --data {images} --k 2", "No config file at {nowhere.yaml}"),
    ("compare {twice.yaml} --data {images} --k 2", "twice.yaml, line 3: the key `k` is there twice."),
    ("compare {loop.yaml} --data {images} --k 2", "loop.yaml builds on itself"),
    ("compare {nepa.yaml} {nepa.yaml} --data {images} --k 2", "Two sources are called nepa with seed 1337"),
    ("compare {nepa.yaml} --data {nowhere} --k 2", "training images: no folder at {nowhere}/train."),
    ("compare {unfinished} --data {images} --k 2", "{unfinished} is no finished run: it has no summary.json"),
    ("compare {run_cut} --data {images} --k 2", "{run_cut}/summary.json is damaged: "),
    ("compare {run_keys} --data {images} --k 2", "{run_keys}/summary.json is damaged: it has no "),
    ("compare {run_type} --data {images} --k 2", "{run_type}/summary.json is damaged: it"),
    # -- export
    ("export {backbone}", "the following arguments are required: target"),
    ("export {backbone} {new}", "the name must end with .onnx (ONNX) or .pt2 (torch.export)."),
    ("export {backbone} {new}.pt2 --batch 0", "batch must be at least 1, got 0."),
    ("export {nowhere} {new}.pt2", "No checkpoint at {nowhere}"),
    ("export {backbone} {file}/x.pt2", "Not a directory"),
    ("export {backbone} {new}.pt2 --img_size 20", "Image size (20, 20) is not divisible by patch size (8, 8)"),
    ("export {plain} {new}.pt2 --attention causal", "cannot build 'plain_vit_tiny_patch14_224'"),
    # -- predict
    ("predict {classifier}", "the following arguments are required: IMAGE"),
    ("predict {nowhere} {images}", "No checkpoint at {nowhere}"),
    ("predict {backbone} {images}", "{backbone} is a backbone, which has no classes. Fine-tune it first"),
    ("predict {half} {images}", "{half}"),
    ("predict {classifier} {nowhere}.jpg", "No image at {nowhere}.jpg."),
    ("predict {classifier} {dead}", "No image at {dead}."),
    ("predict {classifier} {empty}", "{empty} holds no image file."),
    ("predict {classifier} {file}", "None of 1 file(s) can be read as an image: {file} (damaged)."),
    ("predict {classifier} {images} --top 0", "--top must be at least 1, got 0."),
    ("predict {classifier} {images} --batch_size -1", "--batch_size must be at least 1, got -1."),
    ("predict {classifier} {images} --crop_pct 0", "--crop_pct must be in (0, 1], got 0.0."),
    ("predict {classifier} {images} --num_workers -1", "--num_workers must be at least 0, got -1."),
    (
        "predict {classifier} {images} --max_image_pixels 10",
        "None of 10 file(s) can be read as an image: {images}/train/a/0.png (256 pixels, more than",
    ),
    ("predict {classifier} {images} --out {file}", "--out {file}: it is no folder."),
    ("predict {classifier} {images} --crop_mode stretch", "argument --crop_mode: invalid choice: 'stretch'"),
    # -- visualize
    ("visualize", "the following arguments are required: backbone"),
    ("visualize {backbone}", "Give either images or --data."),
    (VISUALIZE + "--images 0", "--images must be at least 1, got 0."),
    (VISUALIZE + "--queries 99", "Query patches [99] are not in 0..3."),
    (VISUALIZE + "--queries -1", "Query patches [-1] are not in 0..3."),
    (VISUALIZE + "--out {new}.doc", "new.doc: its name must end with one of ."),
    (VISUALIZE + "--out {file}", "--out {file}: it is no folder."),
    (VISUALIZE + "--out {file}/x.png", "--out {file}/x.png: Not a directory."),
    ("visualize {plain} --data {images}", "{plain} holds a VisionTransformer, which predicts no next embedding."),
    ("visualize {nowhere} --data {images}", "No checkpoint at {nowhere}"),
    ("visualize {backbone} --data {nowhere}", "training images: no folder at {nowhere}/train."),
    ("visualize {backbone} --data {one_class}", "has one class only, a"),
    # -- benchmark
    (BENCHMARK + "--speps 1", "unrecognized arguments: --speps 1"),
    (BENCHMARK + "--rounds 0", "rounds must be at least 1, got 0."),
    (BENCHMARK + "--steps 0", "steps must be at least 1, got 0."),
    (BENCHMARK + "--batch-size -2", "batch_size must be at least 1, got -2."),
    (BENCHMARK + "--patch-size 0", "patch_size must be at least 1, got 0."),
    (BENCHMARK + "--depth 0", "depth must be at least 1, got 0."),
    (BENCHMARK + "--num-workers -1", "num_workers must be at least 0, got -1."),
    (BENCHMARK + "--devices 999", "devices 999 asks for more than this machine has"),
    (BENCHMARK + "--model giant", "model='giant' is none of tiny"),
    (BENCHMARK + "--img-size 30", "img_size 30 is no multiple of patch_size 14."),
    (BENCHMARK + "--compare maee", "No method 'maee' to time: choose from "),
    (BENCHMARK + "--precision 8-true", "precision='8-true' is none of 32-true"),
    (BENCHMARK + "--compile maybe", "argument --compile: invalid choice: 'maybe'"),
    (BENCHMARK + "--data {nowhere}", "data.train_dir: no folder at {nowhere}."),
    (BENCHMARK + "--compare timm --data {images}/train", "timed on one device and random images"),
    (BENCHMARK + "--out {empty}", "--out {empty}: it is no file."),
    (BENCHMARK + "--out {new}/", "give the name of a file."),
    (BENCHMARK + "--out /proc/x.json", "--out /proc/x.json: "),
    # -- shards
    ("shards", "the following arguments are required: folder, out"),
    ("shards {nowhere} {new}", "make_shards: no folder at {nowhere}."),
    ("shards {file} {new}", "make_shards: {file} is a file, no folder."),
    ("shards {empty} {new}", "make_shards: {empty} holds no image."),
    ("shards {images}/train {empty}", "{empty} exists. Choose another folder for the shards, or remove it."),
    ("shards {images}/train {file}/x", "the shards' folder {file}/x: Not a directory."),
    ("shards {images}/train {new} --images_per_shard 0", "images_per_shard must be at least 1, got 0."),
    ("shards {images}/train {new} --seed x", "argument --seed: invalid int value: 'x'"),
    ("shards {damaged}/train {new}", "{damaged}/train/a/1.png (damaged). Remove or repair them, or pass --skip_bad."),
    ("shards {links}/train {new}", "again is a link to a folder that it is in."),
    ("shards --index {empty} {new}", "data.train_shards: {empty} holds no .tar file."),
    ("shards --index {nowhere}/x.tar {new}", "data.train_shards: 1 of 1 shard(s) are missing, first {nowhere}/x.tar."),
    ("shards --index {tars} {new}", "The shard {tars}/0.tar cannot be read: "),
    ("shards --index 'pipe:touch ran' {new}", "pipe:touch ran is a shell command. --data.allow_pipe true runs it"),
    ("shards --index {tars} {file}", "{file} exists. Choose another file for the index, or remove it."),
    # -- digit-scenes
    ("digit-scenes", "the following arguments are required: folder"),
    ("digit-scenes {new} --training 0", "--training must be at least 1, got 0."),
    ("digit-scenes {new} --validation -1", "--validation must be at least 1, got -1."),
    ("digit-scenes {new} --seed -1", "--seed must be at least 0, got -1."),
    ("digit-scenes {empty}", "{empty} exists and is left as it is. Remove it or choose another folder."),
    ("digit-scenes {file}", "the folder {file}: it is no folder."),
    ("digit-scenes {file}/x", "the folder {file}/x: Not a directory."),
    # -- convert
    ("convert {backbone}", "the following arguments are required: target"),
    ("convert {backbone} {new} --layout hf", "argument --layout: invalid choice: 'hf'"),
    ("convert {nowhere} {new}", "No checkpoint at {nowhere}"),
    ("convert {half} {new}", "{half}"),
    ("convert {backbone} {plain}", "{plain}/config.json exists; choose another folder."),
    ("convert {backbone} {file}", "the folder {file}: it is no folder."),
    ("convert {backbone} {new} --layout mmengine", "the name of an mmengine checkpoint ends with .pth."),
    ("convert {backbone} {plain} --layout mmengine", "it is no file."),
    ("convert {backbone} {new} --weights best", "argument --weights: invalid choice: 'best'"),
    ("convert {plain} {new} --layout nepa --dry_run", "The published layout holds NEPA predictors"),
    ("convert {plain} {new} --layout nepa", "The published layout holds NEPA predictors, not VisionTransformer."),
]


def fill(text, root):
    """Put paths in the place of {names}."""
    import re

    return re.sub(r"\{([\w.]+)\}", lambda match: str(root / match[1]), text)


def tree(root):
    return {path: path.lstat().st_size for path in sorted(root.rglob("*")) if not path.is_dir()}


@pytest.fixture
def there(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return place


@pytest.mark.parametrize(("command", "message"), ROWS, ids=[row[0][:60] for row in ROWS])
def test_one_line_and_nothing_written(command, message, there, tmp_path, capsys):
    import shlex

    name, *args = shlex.split(fill(command, there))
    before = tree(there)
    main = importlib.import_module(f"nepa_plugin.commands.{nepa_command.COMMANDS[name][0]}").main
    said = refusal(capsys, main, args)
    assert fill(message, there) in said
    assert tree(there) == before and not list(tmp_path.iterdir())


def test_the_table_is_long_enough():
    rows = {name: sum(row[0].split()[0] == name for row in ROWS) for name in nepa_command.COMMANDS}
    assert sum(rows.values()) == len(ROWS) >= 80
    covered = {
        "evaluate",
        "compare",
        "visualize",
        "benchmark",
        "shards",
        "digit-scenes",
        "convert",
        "predict",
        "export",
    }
    assert {name for name, count in rows.items() if count >= 6} == covered
