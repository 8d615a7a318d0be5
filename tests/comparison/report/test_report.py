import base64
import csv
import re
from pathlib import Path

import pytest

from nepa_plugin.comparison import Run
from nepa_plugin.comparison.report import accuracy_table, cost_table, inequalities, write_report
from nepa_plugin.comparison.report.tables import spread


def run(name, seed, knn, linear, **summary):
    facts = {
        "method": name.upper(),
        "train_images": 1400,
        "train_fingerprint": "abc",
        "epochs": 2,
        "steps": 20,
        "images_seen": 2560,
        "seconds": 10.0 + seed,
        "images_per_second": 256.0,
        "peak_memory_bytes": 2**30,
        "global_batch_size": 128,
        "views": 1,
        "encoder_passes": 1.0,
        "encoder_tokens": 65.0,
        "gflops": 0.5,
        "backbone_parameters": 200_000,
        "discarded_parameters": 50_000,
        "backbone": {"architecture": "a", "model_args": {"embed_dim": 64, "depth": 4}},
        "backbone_class": "NepaViT",
        "attention": "causal",
        "exported": "backbone",
        "devices": "1 x cpu",
        "precision": "32-true",
        "hardware": {"gpus": [], "cpu": "a CPU", "threads": 2},
        "versions": {"torch": "2.14", "lightly": "1.6", "timm": "1.0"},
    }
    rows = [
        {"depth": depth, "pool": pool, "knn": linear + i - 2, "linear": linear + i}
        for i, depth in enumerate(("embedding", "block 1", "final norm"))
        for pool in ("mean", "last")
    ]
    curves = {"train_loss": [(0, 2.0), (19, 1.0)], "val_online_cls_top1": [(9, 0.5), (19, 0.75)]}
    results = {"knn": {"top1": knn}, "linear": {"top1": linear}, "readout": {"rows": rows}}
    return Run(name, seed, Path("nowhere"), facts | summary, {"model": {"init_args": {}}}, results, curves)


@pytest.fixture
def runs():
    floor = run("untrained NepaViT causal", 0, 30.0, 40.0)
    floor.summary = {}
    return [
        run("nepa", 0, 80.0, 85.0),
        run("nepa", 1, 82.0, 88.0),
        run("mae", 0, 70.0, 75.0, backbone_class="VisionTransformer", attention="bidirectional", encoder_tokens=17.0),
        Run("broken", 0, Path("nowhere"), error="out of memory | at step 3"),
        floor,
    ]


def test_spread():
    assert spread([1.0]) == "1.0" and spread([]) == "" and spread([None, 2.0]) == "2.0"
    assert spread([80.0, 82.0, 81.0]) == "81.0 (80.0-82.0)"


def test_accuracies_are_means_and_ranges_over_seeds(runs):
    table = accuracy_table(runs)
    assert table.header == ["method", "seeds", "kNN", "linear", "best readout", "where"]
    assert table.rows == [
        ["nepa", "2", "81.0 (80.0-82.0)", "86.5 (85.0-88.0)", "88.5 (87.0-90.0)", "final norm, mean"],
        ["mae", "1", "70.0", "75.0", "77.0", "final norm, mean"],
        ["untrained NepaViT causal", "1", "30.0", "40.0", "42.0", "final norm, mean"],
    ]


def test_costs(runs):
    table = cost_table(runs)
    rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert list(rows) == ["nepa", "mae"]  # what was not trained has no cost
    nepa = rows["nepa"]
    assert nepa["training, s"] == "10 (10-11)" and nepa["images seen"] == "2,560" and nepa["peak memory, MiB"] == "1024"
    assert nepa["TFLOP in all"] == "1.28"  # 0.5e9 x 2560
    assert nepa["thrown away, M"] == "0.05" and rows["mae"]["encoder tokens"] == "17"


def test_says_what_is_not_equal(runs):
    equal, different = inequalities(runs)
    assert "attention in pretraining: causal (nepa); bidirectional (mae)" in different
    assert any(
        line.startswith("backbone: NepaViT embed_dim 64, depth 4 (nepa); VisionTransformer") for line in different
    )
    assert "training images: 1400 (abc)" in equal and "global batch: 128" in equal
    runs[2].summary["images_seen"] = 5000
    assert "images seen: 2,560 (nepa); 5,000 (mae)" in inequalities(runs)[1]


def test_files(runs, tmp_path):
    write_report(runs, tmp_path, "python tools/compare.py a b", "A & B")
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"]) for row in rows][:2] == [("nepa", "0"), ("nepa", "1")] and len(rows) == 5
    assert float(rows[1]["knn"]) == 82 and float(rows[1]["training_pflop"]) == pytest.approx(0.00128)
    assert rows[3]["error"].startswith("out of memory") and rows[3]["knn"] == ""
    markdown = (tmp_path / "report.md").read_text()
    assert "| nepa | 2 | 81.0 (80.0-82.0) |" in markdown and "- broken, seed 0: out of memory" in markdown
    for picture in re.findall(r"\((figures/\w+\.png)\)", markdown):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert "<title>A &amp; B</title>" in page and "81.0 (80.0-82.0)" in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing outside the file is needed
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 4 and all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)


def test_a_comparison_in_which_all_failed(tmp_path):
    write_report([Run("a", 0, tmp_path, error="no")], tmp_path, "command")
    assert "- a, seed 0: no" in (tmp_path / "report.md").read_text()
