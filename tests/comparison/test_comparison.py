"""Comparisons: what is refused before any training, and a whole one that is stopped, fails in part, and goes on."""

import json
import re
import runpy
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from holding import held
from PIL import Image

from nepa_plugin.checkpoints import save_backbone
from nepa_plugin.comparison import Comparison, ComparisonError, Run, compare
from nepa_plugin.comparison import run as comparing
from nepa_plugin.comparison.evaluating import read_request, request_for
from nepa_plugin.comparison.floors import alike
from nepa_plugin.data import digits_folder
from nepa_plugin.evaluation import EvaluationOptions
from nepa_plugin.evaluation.finetune import FinetuneOptions
from nepa_plugin.evaluation.linear import LinearOptions
from nepa_plugin.runtime.reading import FileContentError

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "lightly_configs"
FAST = [
    *("--model.backbone_args.embed_dim", "32", "--model.backbone_args.depth", "2", "--trainer.max_epochs", "1"),
    *(
        "--trainer.check_val_every_n_epoch",
        "1",
        "--trainer.limit_train_batches",
        "4",
        "--trainer.log_every_n_steps",
        "1",
    ),
]


def comparison(tmp_path, *sources, **kwargs):
    arguments = {"out": tmp_path / "out", "data": "digits", "protocols": ["knn"], "seeds": [0], "overrides": FAST}
    return Comparison([str(s) for s in sources], **(arguments | kwargs))


def refused(what):
    with pytest.raises((ComparisonError, ValueError)) as error:
        compare(what, say=lambda line: pytest.fail(f"started: {line}"))
    assert not what.out.exists()
    return str(error.value)


NEPA = CONFIGS / "nepa_digits.yaml"


def test_bad_input_is_refused_before_any_training(tmp_path):
    assert "Nothing to compare" in refused(comparison(tmp_path))
    assert "jobs must be at least 1" in refused(comparison(tmp_path, NEPA, jobs=0))
    assert "No config file at" in refused(comparison(tmp_path, NEPA, CONFIGS / "nope.yaml"))
    assert "protocol guess: give one or several of knn" in refused(comparison(tmp_path, NEPA, protocols=["guess"]))
    assert "Two sources are called nepa_digits" in refused(comparison(tmp_path, NEPA, NEPA))
    message = refused(comparison(tmp_path, NEPA, overrides=["--trainer.max_epohcs", "1"]))
    assert "nepa_digits.yaml: config key `trainer.max_epohcs`" in message and "did you mean" in message
    assert "no folder at" in refused(comparison(tmp_path, NEPA, data=str(tmp_path / "nowhere")))
    message = refused(comparison(tmp_path, NEPA, rows={"mae_digits": EvaluationOptions()}))
    assert "--row mae_digits: there is no such row. The rows are nepa_digits." in message
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    assert "is no finished run" in refused(comparison(tmp_path, tmp_path / "unfinished"))


def test_another_comparison_at_work_there_is_left_alone(tmp_path):
    what = comparison(tmp_path, NEPA)
    with held(what.out) as pid, pytest.raises(ValueError, match=f"out is in use by process {pid} on .* another --out"):
        compare(what, say=lambda line: pytest.fail(f"started: {line}"))
    assert [path.name for path in what.out.iterdir()] == [".lock"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A comparison of two methods and a config that cannot train, with one seed each."""
    root = tmp_path_factory.mktemp("comparison")
    shutil.copytree(CONFIGS, root / "configs")
    broken = (
        (root / "configs" / "nepa_digits.yaml")
        .read_text()
        .replace("base_lr", "backbone_args: {num_heads: 5}\n    base_lr")
    )
    (root / "configs" / "broken.yaml").write_text(broken)  # parses, and fails when the backbone is built
    sources = [root / "configs" / f"{name}.yaml" for name in ("nepa_digits", "broken", "simclr_digits")]
    what = comparison(root, *sources, protocols=["knn", "linear", "readout"], jobs=2)
    lines = []
    return what, compare(what, lines.append), lines


@pytest.mark.slow
def test_one_failure_is_reported_and_the_rest_go_on(finished):
    _, runs, lines = finished
    good = {run.name: run for run in runs if run.error is None}
    assert list(good) == [
        "nepa_digits",
        "simclr_digits",
        "untrained NepaViT bidirectional",
        "untrained NepaViT causal",
    ]
    (failed,) = [run for run in runs if run.error is not None]
    assert failed.name == "broken" and "training ended with status" in failed.error
    assert any("broken, seed 0: FAILED" in line for line in lines)
    for run in good.values():
        assert 0 <= run.results["knn"]["top1"] <= 100 and set(run.results) == {"knn", "linear", "readout"}
    assert good["nepa_digits"].summary["images_seen"] == 4 * 64 and len(good["nepa_digits"].curves["train_loss"]) >= 1


@pytest.mark.slow
def test_goes_on_where_it_stopped(finished):
    what, runs, _ = finished
    weights = what.out / "nepa_digits" / "seed0" / "backbone" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    shutil.rmtree(what.out / "simclr_digits" / "seed0" / "evaluation")
    lines = []
    again = compare(what, lines.append)
    assert weights.stat().st_mtime_ns == before
    assert [line for line in lines if "trained already" in line and "nepa_digits" in line]
    assert not any("nepa_digits, seed 0: evaluating" in line for line in lines)
    assert any("simclr_digits, seed 0: evaluating" in line for line in lines)
    scores = [{r.name: r.results["knn"]["top1"] for r in rs if r.error is None} for rs in (runs, again)]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_every_row_is_segmented_and_one_that_fails_leaves_the_others(finished, monkeypatch):
    """What ``tests/segmentation/test_transfer.py`` runs for one row."""
    what, *_ = finished
    asked = []

    def segment(run, config, start, say):
        asked.append((run.name, config))
        if run.name == "simclr_digits":
            raise ComparisonError("segmentation ended with status 1: no memory (see a.log)")
        return {"segmentation_frozen": {"mIoU": 20.0}, "segmentation": {"mIoU": 40.0 + len(run.name)}}

    monkeypatch.setattr(comparing, "check_segmentation", Path)
    monkeypatch.setattr(comparing, "segment", segment)
    lines = []
    runs = compare(replace(what, segmentation="scenes.py"), lines.append)
    rows = ["nepa_digits", "simclr_digits", "untrained NepaViT bidirectional", "untrained NepaViT causal"]
    assert sorted(asked) == sorted((name, Path("scenes.py")) for name in rows)
    good = {run.name: run for run in runs if run.error is None}
    assert list(good) == [rows[0], *rows[2:]]
    assert all(run.results["segmentation"]["mIoU"] == 40.0 + len(name) for name, run in good.items())
    assert set(good["nepa_digits"].results) == {"knn", "linear", "readout", "segmentation", "segmentation_frozen"}
    assert any("simclr_digits, seed 0: FAILED: segmentation ended with status 1: no memory" in line for line in lines)


@pytest.mark.slow
def test_runs_of_other_options_are_not_mixed_in(finished, tmp_path):
    what, *_ = finished
    other = Comparison(what.sources, what.out, "digits", ["knn"], [0], [*FAST, "--model.base_lr", "1e-3"])
    with pytest.raises(ComparisonError) as refused:
        compare(other)
    folders = [str(what.out / name / "seed0") for name in ("nepa_digits", "broken", "simclr_digits")]
    assert str(refused.value).startswith(", ".join(folders) + ": trained with another config or other options than now")


@pytest.mark.slow
def test_finished_runs_are_taken_as_they_are(finished, tmp_path):
    what, *_ = finished
    folder = tmp_path / "mine"
    shutil.copytree(what.out / "nepa_digits" / "seed0", folder)
    runs = compare(comparison(tmp_path, folder), lambda line: None)
    assert [run.name for run in runs] == ["mine", "untrained NepaViT causal"]
    images = tmp_path / "other"
    for split in ("train", "val"):
        for label in ("0", "1"):
            (images / split / label).mkdir(parents=True)
            for i in range(20):
                Image.new("L", (32, 32), 10 * i).save(images / split / label / f"{i}.png")
    with pytest.raises(ComparisonError, match=r"was trained on other images \(1400 in"):
        compare(comparison(tmp_path, folder, data=str(images)))
    shutil.copytree(digits_folder(), tmp_path / "copied")  # the same images elsewhere
    compare(comparison(tmp_path, folder, data=str(tmp_path / "copied")), lambda line: None)


@pytest.mark.slow
def test_the_command(finished, capsys, monkeypatch):
    what, *_ = finished
    arguments = ["compare.py", *what.sources, "--data", "digits", "--evaluate", "knn,linear,readout", "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(what.out), "--", *FAST])
    with pytest.raises(SystemExit) as status:
        runpy.run_path(str(ROOT / "tools" / "compare.py"), run_name="__main__")
    printed = capsys.readouterr()
    assert status.value.code == 1 and "error: broken, seed 0: training ended" in printed.err
    assert "NEPA" in printed.out
    knn = json.loads((what.out / "nepa_digits/seed0/evaluation/results.json").read_text())["protocols"]["knn"]["top1"]
    markdown = (what.out / "report.md").read_text()
    assert re.search(rf"\| NEPA \| 1 \|.*\| (\*\*)?{knn:.1f}(\*\*)? \|", markdown)
    assert (what.out / "report.html").is_file() and (what.out / "results.csv").is_file()


@pytest.mark.slow
def test_several_jobs_score_as_one_does(finished):
    """They evaluate in processes of their own."""
    what, runs, _ = finished
    folders = [what.out / name / "seed0" for name in ("nepa_digits", "simclr_digits")]
    options = replace(what.options, cache=False)
    rows = compare(replace(what, sources=folders, options=options, jobs=1), lambda line: None)
    before = {run.name: run.results for run in runs if run.error is None}
    assert [run.name for run in rows] == list(before)
    for run in rows:
        assert run.results["knn"]["top1"] == pytest.approx(before[run.name]["knn"]["top1"], abs=0.3)
        assert run.results["knn"]["time"] != before[run.name]["knn"]["time"]


@pytest.mark.slow
def test_a_job_that_is_free_scores_floors_while_the_last_row_is_scored(finished, monkeypatch):
    what, *_ = finished
    at_a_floor, met = threading.Event(), []

    def evaluate(run, *_):
        if run.trained:
            met.append(run.name != "simclr_digits" or at_a_floor.wait(60))
        else:
            at_a_floor.set()

    monkeypatch.setattr(comparing, "_evaluate", evaluate)
    folders = [what.out / name / "seed0" for name in ("nepa_digits", "simclr_digits")]
    rows = compare(replace(what, sources=folders), lambda line: None)
    assert met == [True, True] and [run.trained for run in rows] == [True, True, False, False]


@pytest.mark.slow
def test_an_evaluation_that_fails_apart_says_why_and_the_others_go_on(finished, tmp_path):
    what, *_ = finished
    runs = shutil.copytree(what.out, tmp_path / "runs")
    folders = [runs / name / "seed0" for name in ("nepa_digits", "simclr_digits")]
    (folders[0] / "backbone" / "model.safetensors").write_bytes(b"no weights")
    again = replace(what, sources=folders, out=tmp_path / "out", protocols=["linear"], floors=False)
    options = replace(what.options, temperature=0.2)  # not what there is
    failed, good = compare(replace(again, options=options), lambda line: None)
    assert re.search(r"^evaluation: \S*runs/nepa_digits/seed0/backbone.*\(see .*evaluation.log\)", failed.error)
    assert "Traceback" in (folders[0] / "evaluation.log").read_text()
    assert good.error is None and good.results["linear"]["top1"] > 10


def test_networks_that_are_alike_but_for_their_attention_are_fine_tuned_once(tmp_path, monkeypatch):
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    floors = []
    for number, (seed, more) in enumerate(
        [(0, {"attention": "bidirectional"}), (0, {"attention": "causal"}), (0, {"mlp_ratio": 2.0}), (1, {})]
    ):
        torch.manual_seed(seed)
        model = timm.create_model("nepa_vit_tiny_patch14_224", **(sizes | more))
        floors.append(Run(f"untrained {number}", seed, tmp_path / str(number)))
        save_backbone(model, floors[-1].folder / "backbone")
    (floors[3].folder / "backbone" / "model.safetensors").write_bytes(b"no weights")
    groups = alike(floors)
    assert groups == [floors[:2], floors[2:3], floors[3:]]
    asked, lines = [], []

    def results(run, what, options, protocols, folder, *rest):
        asked.append((run.name, options.finetune.attention, list(protocols)))
        return {name: {"top1": 10.0 * len(asked)} for name in protocols}

    monkeypatch.setattr(comparing, "_results", results)
    what = comparison(tmp_path, NEPA, protocols=["finetune", "knn"], causal=True)
    first, second = groups[0]
    comparing._evaluate(first, what, "first: ", lines.append)
    comparing._evaluate(second, what, "second: ", lines.append, twin=first)
    assert asked == [
        ("untrained 0", "bidirectional", ["finetune", "knn"]),
        ("untrained 0", "causal", ["finetune"]),
        ("untrained 1", "bidirectional", ["knn"]),
    ]
    assert first.results == {"finetune": {"top1": 10.0}, "knn": {"top1": 10.0}, "finetune_causal": {"top1": 20.0}}
    assert second.results == first.results | {"knn": {"top1": 30.0}}
    assert lines[1].endswith("(fine-tuned once for this and untrained 0)") and "once" not in lines[0]
    there = {first.folder / "evaluation": {}, second.folder / "evaluation": {"finetune": {}}}
    with monkeypatch.context() as patched:
        patched.setattr(comparing, "_done", lambda out, options, what: there[out])
        assert comparing._tuned_first([first, second], what) == [second, first]
        assert comparing._tuned_first([first, second], replace(what, protocols=["knn"])) == [first, second]
    asked.clear()
    own = EvaluationOptions(finetune=FinetuneOptions(attention=None))  # each keeps its own attention
    comparing._evaluate(second, replace(what, options=own, causal=False), "", lines.append, twin=first)
    other = {"untrained 1": EvaluationOptions(finetune=FinetuneOptions(epochs=3))}
    comparing._evaluate(second, replace(what, rows=other, causal=False), "", lines.append, twin=first)
    assert [protocols for _, _, protocols in asked] == [["finetune", "knn"]] * 2


def test_what_an_evaluation_is_asked_survives_its_file(tmp_path):
    own = {"linear": LinearOptions(crop_scale=(0.2, 1.0)), "model_args": {"attention": "causal"}, "num_workers": 0}
    options = EvaluationOptions(**own, finetune=FinetuneOptions(epochs=3, lr=4e-3, attention="causal"))
    path = tmp_path / "request.json"
    path.write_text(json.dumps(request_for("digits", options)))
    assert read_request(path) == ("digits", options)
    assert read_request(path)[1] != EvaluationOptions()
    path.write_text('{"data": "digits", "k": 5}')  # written before there were the other options
    assert read_request(path) == ("digits", EvaluationOptions(k=5))
    for text in ('{"data": "digits", "neighbours": 5}', '{"data": "digits", "k": "five"}', '{"k": 5}'):
        path.write_text(text)
        with pytest.raises(FileContentError, match=r"request.json is damaged: .* Remove"):
            read_request(path)


@pytest.mark.slow
def test_runs_on_several_devices(tmp_path):
    """Lightning starts the command of a run again for its second process."""
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size_per_device", "32"]
    (run, _) = compare(comparison(tmp_path, NEPA, overrides=[*FAST, *two]), lambda line: None)
    assert run.error is None and run.summary["devices"] == "2 x cpu" and run.summary["images_seen"] == 4 * 64
