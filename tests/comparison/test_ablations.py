"""Ablations and orders as rows of a comparison: their configs, both ways of fine-tuning, and runs that diverge."""

from pathlib import Path

import pytest
import yaml

import nepa_plugin
from nepa_plugin.analysis.attention import attention_probabilities, attention_statistics, uniform_statistics
from nepa_plugin.commands.compare import main
from nepa_plugin.comparison import Comparison, compare
from nepa_plugin.comparison.report import write_report
from nepa_plugin.comparison.report.ablations import PUBLISHED, ablation_table
from nepa_plugin.comparison.report.attention import attention_table
from nepa_plugin.data import evaluation_loaders
from nepa_plugin.evaluation import EvaluationOptions
from nepa_plugin.evaluation.finetune import FinetuneOptions
from nepa_plugin.methods import NEPA
from nepa_plugin.order import PATCH_ORDERS
from nepa_plugin.training.configs import read_config

CONFIGS = Path(__file__).parents[2] / "lightly_configs"
BASE = read_config(CONFIGS / "nepa_digits.yaml")
ABLATIONS, ORDERS = (sorted((CONFIGS / name).glob("*.yaml")) for name in ("ablations", "orders"))
FAST = [
    *("--model.backbone_args.embed_dim", "32", "--model.backbone_args.depth", "2", "--trainer.max_epochs", "1"),
    *("--trainer.limit_train_batches", "4", "--trainer.log_every_n_steps", "1", "--trainer.limit_val_batches", "0"),
]


def changed(config):
    """The arguments of the method that a config has and its base has not, with those of the backbone."""
    own, base = (each["model"]["init_args"] for each in (config, BASE))
    found = {key: value for key, value in own.items() if key != "backbone_args" and value != base.get(key)}
    backbone = own["backbone_args"], base["backbone_args"]
    return found | {key: value for key, value in backbone[0].items() if value != backbone[1].get(key)}


@pytest.mark.parametrize("path", [*ABLATIONS, *ORDERS], ids=lambda path: path.stem)
def test_a_config_changes_one_thing_and_can_be_built(path):
    config = read_config(path)
    options = changed(config)
    assert set(options) in ({"swiglu_mlp", "mlp_ratio"}, *({name} for name in options))
    args = config["model"]["init_args"] | {"num_classes": 0}
    args["backbone_args"] = BASE["model"]["init_args"]["backbone_args"] | args["backbone_args"]
    method, plain = NEPA(**args), NEPA(**(BASE["model"]["init_args"] | {"num_classes": 0}))
    for name, value in options.items():
        assert method.hparams.get(name, value) == value
    assert path.read_text().startswith("# NEPA on the digits ")
    if path.stem == "swiglu":  # as many parameters, to two in a hundred
        sizes = [sum(p.numel() for p in one.parameters()) for one in (method, plain)]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


def test_they_are_found_by_name():
    assert read_config("no_shift") == read_config(CONFIGS / "ablations" / "no_shift.yaml")
    assert read_config("lightly_configs/orders/hilbert") == read_config(CONFIGS / "orders" / "hilbert.yaml")


def test_every_order_and_every_ablation_of_the_paper_has_a_config():
    orders = {read_config(path)["model"]["init_args"]["backbone_args"]["order"] for path in ORDERS}
    assert orders == {"random:0", *PATCH_ORDERS} - {"raster"}
    assert set(PUBLISHED) <= {path.stem for path in ABLATIONS}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """NEPA, one that learns to copy, and one that diverges."""
    root = tmp_path_factory.mktemp("ablations")
    diverging = {"base": str(CONFIGS / "nepa_digits.yaml"), "model": {"init_args": {"base_lr": 1e30}}}
    (root / "diverging.yaml").write_text(yaml.safe_dump(diverging))
    sources = [CONFIGS / "nepa_digits.yaml", CONFIGS / "ablations" / "no_shift.yaml", root / "diverging.yaml"]
    options = EvaluationOptions(finetune=FinetuneOptions(epochs=1, attention="bidirectional"))
    what = Comparison(
        [str(source) for source in sources],
        root / "out",
        "digits",
        ["finetune"],
        [0],
        FAST,
        options,
        causal=True,
        attention=True,
        floors=False,
    )
    runs = compare(what, lambda line: None)
    write_report(runs, root / "report", "nepa compare")
    return root, what, runs


@pytest.mark.slow
def test_both_ways_of_fine_tuning_are_columns(finished):
    root, what, runs = finished
    for run in runs[:2]:
        both = [run.results[name] for name in ("finetune", "finetune_causal")]
        assert [entry["options"]["finetune"]["attention"] for entry in both] == ["bidirectional", "causal"]
        for folder, attention in (("evaluation", "bidirectional"), ("evaluation-causal", "causal")):
            assert nepa_plugin.load_backbone(run.folder / folder / "finetuned").attention == attention
    report = (root / "report" / "report.md").read_text()
    assert "| fine-tuned | fine-tuned, causal |" in report
    lines = []
    again = compare(what, lines.append)
    for one, other in zip(again[:2], runs[:2], strict=True):
        assert {k: entry["top1"] for k, entry in one.results.items()} == {
            k: entry["top1"] for k, entry in other.results.items()
        }
    assert not any("evaluating" in line for line in lines)


@pytest.mark.slow
def test_attention_is_a_table(finished):
    root, _, runs = finished
    backbone = nepa_plugin.load_backbone(runs[0].folder / "backbone")
    image = evaluation_loaders("digits", backbone, 1)[1].dataset[0][0][None]
    assert len(runs[0].attention["distance"]) == len(backbone.blocks) == 2
    causal = uniform_statistics((8, 8), 1, range(64))
    for kind in ("distance", "entropy", "outside"):  # four steps have not changed much
        own = float(getattr(attention_statistics(attention_probabilities(backbone, image)[2], (8, 8), 1), kind).mean())
        assert runs[0].attention[kind][1] == pytest.approx(own, rel=0.1)
        assert runs[0].attention[kind][1] <= causal[kind] * 1.1
    table = attention_table(runs)
    assert [row[1] for row in table.rows] == ["1, 2"] * 2
    assert "## Attention" in (root / "report" / "report.md").read_text()


@pytest.mark.slow
def test_a_run_that_diverges_is_a_row(finished):
    root, _, runs = finished
    assert [run.error is None for run in runs] == [True, True, False]
    table = ablation_table(runs)
    rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert len(rows) == 3
    nepa, copying, diverged = rows.values()
    assert float(copying["loss"]) < -0.8 < float(nepa["loss"])
    assert copying["published"] == "the loss is met by copying; fine-tuning diverges" and nepa["published"] == ""
    assert nepa["trained"] == "to the end"
    assert "1 of 1 failed" in diverged["trained"] and "not finite" in diverged["trained"]
    assert "## NEPA's rows in training" in (root / "report" / "report.md").read_text()
    assert (root / "report" / "figures" / "ablations.png").stat().st_size > 10_000


@pytest.mark.slow
def test_one_row_of_nepa_is_no_ablation(finished):
    assert ablation_table(finished[2][:1]).rows == []


def test_causal_needs_fine_tuning(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["nepa_digits", "--data", "digits", "--evaluate", "knn", "--causal", "--out", str(tmp_path / "out")])
    assert capsys.readouterr().err == "error: --causal goes with --evaluate finetune.\n"
