"""The script for the first GPU, at toy size, whose failures leave the other parts; two hosts; what is to be tried."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml

from nepa_plugin import save_backbone
from nepa_plugin.methods import NEPA
from nepa_plugin.training.cli import base_config, main
from nepa_plugin.training.configs import read_config

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_all_parts_run_at_toy_size(tmp_path):
    pytest.importorskip("mmseg")
    command = [sys.executable, str(SCRIPT), "--toy", "--out", str(tmp_path)]
    environment = dict(os.environ, PYTHONPATH=str(SCRIPT.parents[1]))
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "gpu.json").read_text())
    names = [
        "peak",
        "parity",
        "waits",
        "strategies",
        "every_method",
        "finetuning",
        "pipelines",
        "steps",
        "segmentation",
        "kernels",
        "memory",
    ]
    assert list(results["parts"]) == names and not any("failed" in found for found in results["parts"].values())
    assert results["parts"]["parity"]["causal, float32"] < 1e-5
    assert results["parts"]["waits"]["ibot"] == "none"
    assert float(results["parts"]["strategies"]["fsdp"].removeprefix("largest difference ")) < 1e-5
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"## {name}" in page for name in names)


def test_scenes_are_not_scored_with_runs_of_another_backbone(tmp_path, monkeypatch, capsys):
    """The curves of finished runs are read again, and refused once what they depend on has changed."""
    pytest.importorskip("mmseg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import digit_scenes

    monkeypatch.setenv("DIGIT_SCENES", "scenes")
    command = ["digit_scenes.py", "--seeds", "3", "--runs", "runs"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="no backbone runs/demo/backbone"):
        digit_scenes.main()
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = timm.create_model("nepa_vit_tiny_patch14_224", **size)
    save_backbone(model, Path("runs/demo/backbone"))
    with pytest.raises(SystemExit, match="no scenes in scenes"):
        digit_scenes.main()
    Path("scenes").mkdir()
    Path("scenes/0.png").write_bytes(b"scene")
    trained = []

    def train(work_dir, options):
        trained.append((work_dir.name, options))
        (work_dir / "1" / "vis_data").mkdir(parents=True)
        rows = [json.dumps({"step": step, "mIoU": step / 10}) for step in range(100, 501, 100)]
        (work_dir / "1" / "vis_data" / "2026.json").write_text("\n".join(rows))

    monkeypatch.setattr(digit_scenes, "train", train)
    for _ in range(2):
        digit_scenes.main()
        assert "| random | mean | 10.0 | 20.0 | 30.0 | 40.0 | 50.0 |" in capsys.readouterr().out
    seed = "randomness.seed=3"
    assert trained == [("pretrained-3", [seed]), ("random-3", [seed, "model.backbone.init_cfg=None"])]
    torch.nn.init.ones_(model.patch_embed.proj.weight)
    save_backbone(model, Path("runs/demo/backbone"), overwrite=True)
    with pytest.raises(SystemExit, match="pretrained-3 is of another config, backbone, or other scenes"):
        digit_scenes.main()
    assert len(trained) == 2


def test_one_failure_leaves_the_others(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def dies(place):
        """Dies."""
        os._exit(3)

    def raises(place):
        """Raises."""
        raise ValueError("no such\nkernel")

    def hangs(place):
        """Hangs."""
        import time

        time.sleep(60)

    def works(place):
        """Works."""
        return {"answer": 42}

    def never(place):
        """Comes too late."""

    monkeypatch.setattr(script, "PARTS", [dies, raises, hangs, works])
    monkeypatch.setattr(script, "PART_SECONDS", 1)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--toy", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 1
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts["dies"]["failed"] == "its process died"
    assert parts["raises"]["failed"] == "FAILED: ValueError: no such kernel"
    assert parts["hangs"]["failed"] == "ended after 1 s"
    assert parts["works"]["answer"] == 42
    assert "| answer | 42 |" in (tmp_path / "gpu.md").read_text()
    monkeypatch.setattr(script, "PARTS", [never])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--toy", "--seconds", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        script.main()
    assert "the time was over" in (tmp_path / "gpu.json").read_text()


def test_two_hosts_say_what_they_need(tmp_path):
    command = [sys.executable, str(SCRIPT.with_name("two_hosts.py")), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, PATH=str(tmp_path)))
    assert done.returncode == 77 and not (tmp_path / "out").exists()
    assert done.stdout.startswith("Skipped: two hosts on one machine need ") and "iproute2" in done.stdout


# -- what is to be tried before it goes into the package --------------------------------------------------------------

TRIED = Path(__file__).parents[1] / "benchmarks" / "tried"


@pytest.fixture
def tried(monkeypatch):
    monkeypatch.syspath_prepend(str(TRIED))
    sizes = {"backbone": "nepa_vit_tiny_patch14_224", "img_size": 32, "patch_size": 8, "num_classes": 0}
    sizes["backbone_args"] = {"embed_dim": 32, "depth": 4, "num_heads": 2}

    def build(**options):
        torch.manual_seed(0)
        return importlib.import_module("tried").Tried(**sizes, **options)

    return build


def test_nothing_more_is_nepa(tried):
    model, images = tried(), torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(model.step([images])[0], NEPA.step(model, [images])[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", sorted((TRIED / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_part_that_was_tried_has_a_gradient(tried, path):
    options = read_config(path)["model"]["init_args"]
    own = {
        name: options[name] for name in signature(importlib.import_module("tried").Tried).parameters if name in options
    }
    of_nepa = ("predictor_head", "stop_gradient", "horizon", "loss", "input_mask_ratio")
    kept = {name: options[name] for name in of_nepa if name in options}
    model, images = tried(**own, **kept), torch.randn(4, 3, 32, 32)
    torch.manual_seed(1)
    loss, _ = model.step([images])
    loss.backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for name, p in model.named_parameters() if "probe" not in name
    )
    plain = {"embedding_lr", "embedding_warmup"}  # of the optimizer, not of the loss
    plainly = tried(**kept)
    torch.manual_seed(1)
    same = torch.allclose(loss, plainly.step([images])[0], rtol=0, atol=1e-6)
    assert same == (set(own) <= plain)


def test_contrast_in_the_batch_is_a_choice_among_all_of_its_patches(tried):
    loss = tried(batch_contrast=True).criterion
    z, p = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    targets = z[:, 1:].flatten(0, 1)
    terms = [
        torch.stack([F.cosine_similarity(one, other, dim=0) / 0.1 for other in targets]).log_softmax(0)[i]
        for i, one in enumerate(p[:, :-1].flatten(0, 1))
    ]
    assert loss(z, p).item() == pytest.approx(-torch.stack(terms).mean().item(), abs=1e-5)


def test_what_a_training_logged_is_printed(tmp_path, monkeypatch, capsys):
    (tmp_path / "a" / "seed0").mkdir(parents=True)
    losses, norms, ranks = (0.5, 0.75, 0.25), (3.0, 8.0, 1.0), (6.0, 3.0, 3.0)
    lines = ["step,train_loss,grad_norm,embedding_effective_rank"]
    lines += [f"{i},{','.join(map(str, row))}" for i, row in enumerate(zip(losses, norms, ranks, strict=True))]
    (tmp_path / "a" / "seed0" / "metrics.csv").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(TRIED))
    monkeypatch.setattr(sys, "argv", ["training.py", str(tmp_path)])
    importlib.import_module("training").main()
    assert capsys.readouterr().out == "a, seed0: gradient 8.00, rise 0.250, rank 4.0\n"


def test_the_first_patches_see_one_another_and_what_is_behind_them_is_predicted(tried):
    model, images = tried(prefix=True).eval(), torch.randn(2, 3, 32, 32)
    torch.manual_seed(3)
    loss = model.step([images])[0]
    torch.manual_seed(3)
    last = int(torch.randint(16, ()))  # of 17 tokens
    assert 0 < last < 15
    z = x = model.backbone.embed(images)
    seen = torch.ones(17, 17, dtype=torch.bool).tril()
    seen[:, : last + 1] = True
    for block in model.backbone.blocks:
        x = block(x, rope=model.backbone.rope.get_embed(), attn_mask=seen)
    found = F.cosine_similarity(model.backbone.norm(x)[:, last:-1], z[:, last + 1 :], dim=-1)
    assert loss.item() == pytest.approx(-found.mean().item(), abs=1e-6)
    assert not any(block._forward_pre_hooks for block in model.backbone.blocks)


# -- what takes several sittings --------------------------------------------------------------------------------------


@pytest.fixture
def sittings(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("once")


def test_a_command_runs_once_and_what_was_asked_for_in_other_words_is_refused(sittings, tmp_path):
    code = "import pathlib, sys; p = pathlib.Path(sys.argv[2]); p.mkdir(); (p / 'x.json').write_text(sys.argv[1])"
    folder, request = tmp_path / "a" / "seed0", tmp_path / "a" / "seed0.request.json"
    config = {"lr": 0.1}
    assert sittings.once(folder, ["-c", code, "7"], config, "x.json", [str(folder)]) == 7
    (folder / "x.json").write_text("8")  # which another run would write over
    assert sittings.once(folder, ["-c", code, "7"], config, "x.json", ["elsewhere"]) == 8
    with pytest.raises(SystemExit, match=r"seed0 was made with 7 and not 6: .* delete it and seed0.request.json"):
        sittings.once(folder, ["-c", code, "6"], config, "x.json", [str(folder)])
    with pytest.raises(SystemExit, match="made with another config, or other weights: "):
        sittings.once(folder, ["-c", code, "7"], {"lr": 0.2}, "x.json", [str(folder)])
    request.unlink()
    with pytest.raises(SystemExit, match="made with nothing and not -c: "):
        sittings.once(folder, ["-c", code, "7"], config, "x.json", [str(folder)])
    assert (folder / "x.json").read_text() == "8" and not request.exists()
    with pytest.raises(SystemExit, match=r"failed; see .*none.log"):
        sittings.once(tmp_path / "none", ["-c", "1 / 0"], config, "x.json")
    assert "ZeroDivisionError" in (tmp_path / "none.log").read_text()


def test_rows_of_calls_before_are_kept(sittings, tmp_path):
    path = tmp_path / "results.csv"
    for row, seed, score in (("mae", 0, 1.5), ("nepa", 0, 2.5), ("mae", 1, 3.5), ("mae", 0, 4.5)):
        rows = sittings.keep(path, {"row": row, "seed": seed, "score": score}, ["row", "seed"])
    assert path.read_text().splitlines() == ["row,seed,score", "mae,0,4.5", "nepa,0,2.5", "mae,1,3.5"]
    assert rows == [
        {"row": "mae", "seed": "0", "score": "4.5"},
        {"row": "nepa", "seed": "0", "score": "2.5"},
        {"row": "mae", "seed": "1", "score": "3.5"},
    ]


def test_a_row_is_a_name_or_a_path(sittings, monkeypatch, tmp_path):
    pytest.importorskip("mmengine")
    rows, cifar10, camvid = map(importlib.import_module, ("rows", "cifar10", "camvid"))
    monkeypatch.chdir(tmp_path)
    for row in (*camvid.ROWS, *cifar10.METHODS):
        assert read_config(rows.config_of(row))["model"]["class_path"].startswith("nepa_plugin.methods.")
    assert rows.config_of("mae") == rows.ROOT / "lightly_configs" / "mae_cifar10.yaml"
    (tmp_path / "own.yaml").write_text("base: x\n")
    assert rows.config_of("own.yaml") == tmp_path / "own.yaml"
    (tmp_path / "data" / "images" / "training").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["camvid.py", "data", "--rows", "mae", "mea"])
    with pytest.raises(SystemExit, match=r"no file .*mea_cifar10.yaml of row mea\."):
        camvid.main()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("row", ["mae", "simclr"])
def test_a_size_leaves_the_other_arguments_of_a_backbone(sittings, row, capsys):
    rows, cifar10 = map(importlib.import_module, ("rows", "cifar10"))
    given = argparse.Namespace(
        methods=[row], out=Path("runs/x"), seeds=[0], jobs=2, tuned=12, epochs=20, no_untrained=True
    )
    line = cifar10.command(Path("data"), given)
    assert "--no_untrained" in line
    options = line[line.index("--") + 1 :]
    with pytest.raises(SystemExit) as end:
        main(["--config", str(rows.config_of(row)), *options, "--data.train_dir", "x", "--print_config"], base_config())
    assert not end.value.code
    built = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["backbone_args"]
    own = read_config(rows.config_of(row))["model"]["init_args"].get("backbone_args", {})
    assert built == own | {"embed_dim": 128, "depth": 4, "num_heads": 4}
    assert ("attention" in own) == (row == "simclr")


def test_a_floor_of_another_network_is_not_taken(sittings, tmp_path):
    pytest.importorskip("mmengine")
    camvid = importlib.import_module("camvid")
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "num_heads": 2}
    networks = [timm.create_model("nepa_vit_tiny_patch14_224", depth=depth, **sizes) for depth in (1, 1, 2)]
    folders = [save_backbone(network, tmp_path / f"row{i}") for i, network in enumerate(networks)]
    given = argparse.Namespace(out=tmp_path / "out")
    assert camvid.untrained(folders[0], 0, given) == camvid.untrained(folders[1], 0, given)
    with pytest.raises(SystemExit, match=r"row2 is another network than that of .*: give it an --out of its own"):
        camvid.untrained(folders[2], 0, given)
