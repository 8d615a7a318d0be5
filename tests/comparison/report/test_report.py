import base64
import csv
import re
from pathlib import Path

import pytest

from nepa_plugin.comparison import Run
from nepa_plugin.comparison.report import accuracy_table, cost_tables, inequalities, verdict, write_report
from nepa_plugin.comparison.report.costs import spread
from nepa_plugin.comparison.report.exports import latex, latex_table
from nepa_plugin.comparison.report.facts import caveats
from nepa_plugin.comparison.report.methods import PAPERS, labels
from nepa_plugin.comparison.report.published import published_table
from nepa_plugin.comparison.report.scores import best_readout, order, primary
from nepa_plugin.comparison.report.statistics import Noise


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


def test_accuracies_are_means_with_intervals_the_best_first_and_in_bold(runs):
    """kNN of the one row with two seeds: 80 and 82, whose deviation is sqrt 2; t of one degree of freedom is 12.706."""
    table = accuracy_table(runs)
    assert table.header == ["method", "seeds", "best readout", "where", "linear", "kNN"]
    half = 12.706 * 2**0.5
    assert table.rows[0][:2] == ["NEPA", "2"] and table.rows[0][5] == f"81.0 ± {half / 2**0.5:.1f}"
    assert table.rows[1][0] == "MAE" and table.rows[1][5] == f"70.0 ± {half:.1f}"
    assert [row[0] for row in table.rows] == ["NEPA", "MAE", "untrained NepaViT causal"]
    assert table.best == {(0, 2), (0, 4), (0, 5)}


def test_without_several_seeds_there_are_no_intervals(runs):
    table = accuracy_table(runs[1:])
    assert table.rows[0] == ["NEPA", "1", "90.0", "final norm, mean", "88.0", "82.0"]
    assert "nothing tells how much of a difference is noise" in " ".join(verdict(runs[1:]))


def tuned(run, top1):
    options = {"epochs": 20, "batch_size": 64, "lr": 0.016, "head_lr": 2e-3, "layer_decay": 0.9, "select": "last"}
    options = {"finetune": options | {"attention": "bidirectional"}}
    entry = {"top1": top1, "options": options, "ema_decay": 0.99, "seconds": 30.0, "gflops": 0.4, "images_seen": 5000}
    run.results["finetune"] = entry
    return run


def test_an_average_that_has_not_forgotten_the_first_weights_is_said(runs, tmp_path):
    """0.999 after 660 steps is 0.999^659 = 52 % of them; of an older summary, the decay is in the config."""
    kept = {"exported": "moving average", "steps": 660}
    rows = [
        run("fits", 0, 1.0, 2.0, **kept, first_weights=0.99**659),
        run("fitted", 0, 1.0, 2.0, **kept),
        run("other", 0, 1.0, 2.0, steps=660),
        run("short", 0, 1.0, 2.0, **kept, first_weights=0.999**659),
        run("older", 0, 1.0, 2.0, **kept),
        run("teacher", 0, 1.0, 2.0, exported="teacher_backbone", first_weights=0.27),
        tuned(run("tuned", 0, 1.0, 2.0), 90.0),
    ]
    for each in rows[2], rows[4]:
        each.config["model"]["init_args"]["ema_decay"] = 0.999
    rows[6].results["finetune"] |= {"ema_decay": 0.999, "images_seen": 64 * 660}
    end = "% of it are the first weights still: lower its ema_decay, or leave it out and it fits the run."
    assert caveats(rows) == [
        f"Beware: short exports a moving average, and 52{end}",
        f"Beware: older exports a moving average, and 52{end}",
        "Beware: teacher exports a momentum encoder, and 27% of it are the first weights still: lower its momentum.",
        f"Beware: tuned is fine-tuned to a moving average, and 52{end}",
    ]
    write_report(rows, tmp_path, "compare")
    for page in ("report.md", "report.html"):
        head = (tmp_path / page).read_text().partition("Who is ahead")[0]
        assert all(sentence in head for sentence in caveats(rows))
    assert caveats(runs) == []


@pytest.fixture
def compared():
    """Fine-tuning with two seeds each, whose pooled deviation is 1: MAE and NEPA are level, SimCLR is not."""
    half = 2**-0.5
    rows = [("a", "NEPA", 92.0), ("b", "MAE", 93.0), ("c", "SimCLR", 85.0), ("untrained NepaViT causal", "", 88.0)]
    found = []
    for name, method, top1 in rows:
        for seed, value in ((0, top1 - half), (1, top1 + half)):
            one = tuned(run(name, seed, 50.0, 60.0, method=method), value)
            one.summary = one.summary if method else {}
            found.append(one)
    return found


def test_fine_tuning_below_the_networks_own_linear_probe_is_said_at_once(compared, tmp_path):
    for each, linear in zip(compared, (92.4, 92.6, 95.0, 95.0, 60.0, 60.0, 60.0, 60.0), strict=True):
        each.results["linear"]["top1"] = linear
        each.results["finetune"]["ema_decay"] = 0.9
    (said,) = caveats(compared)  # half a point below, as NEPA, is not worth a word
    assert said.startswith("Beware: MAE fine-tuned, 93.0 %, is below the linear probe of its frozen features, 95.0 %: ")
    write_report(compared, tmp_path, "compare")
    assert said in (tmp_path / "report.md").read_text().partition("Who is ahead")[0]
    for each in compared:
        del each.results["finetune"]
    assert caveats(compared) == []


def test_many_rows_of_nepa_are_beside_the_first_one_given():
    """Pooled deviation 1, so that two means of two seeds differ by more than noise beyond 2.8."""
    found = []
    for name, top1 in (("base", 80.0), ("up", 90.0), ("near", 81.0), ("down", 60.0)):
        for seed, value in ((0, top1 - 2**-0.5), (1, top1 + 2**-0.5)):
            found.append(tuned(run(name, seed, 50.0, 60.0, method="NEPA"), value))
    assert verdict(found)[-2:] == [
        "NEPA (base) is number 3, 10.0 points behind, which is more than noise.",
        "Of NEPA's other rows, by more than noise ahead of NEPA (base), the first given: NEPA (up); behind it: NEPA "
        "(down).",
    ]
    assert len(verdict([each for each in found if each.seed == 0])) == 3  # no noise is known of one seed
    assert verdict(found[:2]) == ["NEPA, the only trained row, by fine-tuning: 80.0 %."]


def test_the_noise_is_pooled_and_the_answer_goes_by_it(compared):
    """Four rows of two seeds: four degrees of freedom, t = 2.776; means differ by more than noise beyond 2.776."""
    noise = Noise.of({"a": [1, 3], "b": [5, 5], "c": [7]})
    assert (noise.deviation, noise.freedom) == (1.0, 2) and noise.half_width(4) == pytest.approx(4.3027 / 2, rel=1e-4)
    assert Noise.of({"a": [1.0], "b": []}).half_width(1) is None
    assert primary(compared) == "finetune" and order(compared) == ["b", "a", "untrained NepaViT causal", "c"]
    text = " ".join(verdict(compared))
    assert text.startswith("MAE is first of 3 by fine-tuning: 93.0 %. Within the seeds' noise of it: NEPA.")
    assert "NEPA is number 2, 1.0 points behind, which is within the noise." in text
    assert "From scratch, the best network reaches 88.0 %: 2 of 3 are above it, 2 by more than noise." in text
    for one in compared[:2]:
        one.results["finetune"]["top1"] -= 4
    text = " ".join(verdict(compared))
    assert "It is ahead of every other row by more than the seeds' noise." in text
    assert (
        "NEPA is number 2, 5.0 points behind, which is more than noise." in text
        and "1 of 3 are above it, 1 by more than noise." in text
    )


def test_rows_are_called_by_their_method_and_two_of_one_by_their_own_names_too(runs):
    assert labels(runs) == {n: v for n, v in labels(runs).items() if v}
    assert [labels(runs)[name] for name in ("nepa", "mae", "broken")] == ["NEPA", "MAE", "broken"]
    runs[2].summary["method"] = "NEPA"
    assert labels(runs)["nepa"] == "NEPA (nepa)" and labels(runs)["mae"] == "NEPA (mae)"


def test_every_method_of_the_package_has_a_paper_and_a_published_row_is_marked(runs):
    from nepa_plugin import methods

    assert set(PAPERS) == set(methods.__all__) - {"Method"}
    assert len({paper.key for paper in PAPERS.values()}) == len(PAPERS)
    assert PAPERS["NEPA"].bibtex().startswith("@misc{xu2025nepa,\n") and "2512.16922" in PAPERS["NEPA"].bibtex()
    table = published_table(runs)
    assert all(len(row) == len(table.header) and row[-1] for row in table.rows)
    assert "not reproduced here" in table.note and published_table(runs[3:]).rows == []
    (nepa,) = [row for row in table.rows if row[0] == "NEPA"]
    assert nepa[1:8] == ["1600", "83.8", "11.3 last, 14.1 mean", "48.3", "85.3", "", "54.0"]


def test_costs(runs):
    measured, counted = cost_tables(runs)
    rows = {row[0]: dict(zip(measured.header, row, strict=True)) for row in measured.rows}
    assert list(rows) == ["NEPA", "MAE"]  # what was not trained has no cost
    nepa = rows["NEPA"]
    assert nepa["pretraining, s"] == "10 (10-11)" and nepa["images seen"] == "2,560"
    assert nepa["peak memory, MiB"] == "1024" and "fine-tuning, s" not in nepa
    rows = {row[0]: dict(zip(counted.header, row, strict=True)) for row in counted.rows}
    assert rows["NEPA"]["TFLOP in all"] == "1.28"  # 0.5e9 x 2560
    assert rows["NEPA"]["thrown away, M"] == "0.05" and rows["MAE"]["encoder tokens"] == "17"


def test_costs_of_fine_tuning(compared):
    measured, counted = cost_tables(compared)
    assert measured.header[-1] == "fine-tuning, s" and measured.rows[0][-1] == "30"
    assert counted.header[-1] == "fine-tuning, TFLOP" and counted.rows[0][-1] == "2"  # 0.4e9 x 5000
    equal, _ = inequalities(compared)
    assert (
        "fine-tuning: 20 epochs of batch 64, lr 0.016 per 256 (head 0.002), layer decay 0.9, moving average 0.99"
        in equal
    )


def test_says_what_is_not_equal(runs):
    equal, different = inequalities(runs)
    assert "attention in pretraining: causal (NEPA); bidirectional (MAE)" in different
    assert any(
        line.startswith("backbone: NepaViT embed_dim 64, depth 4 (NEPA); VisionTransformer") for line in different
    )
    assert "training images: 1400 (abc)" in equal and "global batch: 128" in equal
    runs[2].summary["images_seen"] = 5000
    assert "images seen: 2,560 (NEPA); 5,000 (MAE)" in inequalities(runs)[1]
    runs[1].summary["images_seen"] = 5000  # another seed of the first row
    assert "images seen: 2,560 (NEPA of seed 0); 5,000 (NEPA of seed 1, MAE)" in inequalities(runs)[1]


def test_files(compared, tmp_path):
    compared.append(Run("broken", 0, Path("nowhere"), error="out of memory | at step 3"))
    write_report(compared, tmp_path, "python tools/compare.py a b", "A & B")
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 * 4 + 1 and rows[-1]["error"].startswith("out of memory") and rows[-1]["score"] == ""
    for one in compared[:-1]:  # every number is the results' own
        own = {row["protocol"]: row for row in rows if (row["row"], row["seed"]) == (one.name, str(one.seed))}
        assert set(own) == {"finetune", "readout", "linear", "knn"}
        assert {row["metric"] for row in own.values()} == {"top1"}
        for protocol in ("finetune", "linear", "knn"):
            assert float(own[protocol]["score"]) == one.results[protocol]["top1"]
        assert (float(own["readout"]["score"]), own["readout"]["where"]) == best_readout(one)
    assert float(rows[0]["training_pflop"]) == pytest.approx(0.00128) and rows[0]["method"] == "NEPA"
    markdown = (tmp_path / "report.md").read_text()
    assert markdown.splitlines()[2].startswith("MAE is first of 3 by fine-tuning: 93.0 %.")
    assert "| MAE | 2 | **93.0 ± 2.0** |" in markdown and "- broken, seed 0: out of memory" in markdown
    for picture in re.findall(r"\((figures/\w+\.png)\)", markdown):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert "<title>A &amp; B</title>" in page and '<td class="best">93.0 ± 2.0</td>' in page
    assert page.index("MAE is first") < page.index("<img") < page.index("<table")  # the first screen
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing outside the file is needed
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 5 and all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    tex = (tmp_path / "tables.tex").read_text()
    assert r"MAE & 2 & \textbf{93.0 $\pm$ 2.0} &" in tex and tex.count(r"\begin{tabular}") == 3
    bib = (tmp_path / "methods.bib").read_text()
    assert bib.count("@misc{") == 3 and bib.count("{") == bib.count("}")


def test_latex_shows_text_as_it_is():
    assert latex(r"a_b & 5 % \x {y} ~^") == r"a\_b \& 5 \% \textbackslash{}x \{y\} \textasciitilde{}\textasciicircum{}"
    assert latex_table(accuracy_table([])).count(r"\\") == 1


def test_a_comparison_in_which_all_failed(tmp_path):
    write_report([Run("a", 0, tmp_path, error="no")], tmp_path, "command")
    assert "- a, seed 0: no" in (tmp_path / "report.md").read_text()
