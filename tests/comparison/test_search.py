"""The search: equal budgets, the same choices by the same seed, and scores on training images no trial has seen."""

import json
from dataclasses import replace
from inspect import signature
from pathlib import Path
from random import Random

import pytest
from test_comparison import FAST, NEPA, comparison

from nepa_plugin import methods
from nepa_plugin.comparison import ComparisonError, Run, compare
from nepa_plugin.comparison.plan import request_of
from nepa_plugin.comparison.report import write_report
from nepa_plugin.comparison.report.searched import search_table
from nepa_plugin.comparison.search import KNOBS, LR_SPAN, Search, Trial, _held_out, choices, search
from nepa_plugin.comparison.shorter import shorter_config, shorter_overrides
from nepa_plugin.data import TRAINING_DIGITS, digits_folder
from nepa_plugin.evaluation import EvaluationOptions
from nepa_plugin.evaluation.finetune import FinetuneOptions
from nepa_plugin.runtime.files import write_json
from nepa_plugin.training.configs import read_config

SHORT = [*FAST, "--model.backbone_args.num_heads", "2"]


def test_every_method_has_a_knob_that_it_takes_with_the_published_value_among_the_others():
    assert set(KNOBS) == set(methods.__all__) - {"Method"}
    for name, (knob, values) in KNOBS.items():
        method = getattr(methods, name)
        own = next(c for c in method.__mro__ if knob in signature(c.__init__).parameters)
        default = signature(own.__init__).parameters[knob].default
        assert (list(default) if isinstance(default, tuple) else default) in values and len(values) >= 3


def test_choices_follow_from_the_seed_and_start_with_the_config_as_it_is():
    config = read_config(NEPA)
    trials = choices(config, 6, Random("0 nepa"))
    assert trials == choices(config, 6, Random("0 nepa")) != choices(config, 6, Random("1 nepa"))
    assert trials[0] == {} and len({json.dumps(options) for options in trials}) == 6
    for options in trials[1:]:
        assert 4e-3 / LR_SPAN <= options["base_lr"] <= 4e-3 * LR_SPAN
        assert options["crop_scale"] in KNOBS["NEPA"][1]
    del config["model"]["init_args"]["base_lr"]  # then about the method's own
    assert all(3e-4 / 4 <= options["base_lr"] <= 3e-4 * 4 for options in choices(config, 6, Random(0))[1:])


def test_every_fifth_training_image_of_each_class_is_held_out_and_no_validation_image_is_used(tmp_path):
    folder, counts = _held_out(comparison(tmp_path, NEPA))
    parts = {part: {p.resolve() for p in (folder / part).rglob("*.*")} for part in ("train", "val")}
    assert counts == (len(parts["train"]), len(parts["val"])) and sum(counts) == TRAINING_DIGITS
    assert not parts["train"] & parts["val"]
    assert parts["train"] | parts["val"] == {p.resolve() for p in (digits_folder() / "train").rglob("*.*")}
    for label in "0123456789":
        names = [len(list((folder / part / label).iterdir())) for part in ("train", "val")]
        assert names[1] == sum(names) // 5


def refused(what, *args):
    with pytest.raises((ComparisonError, ValueError)) as error:
        search(what, *args, say=lambda line: pytest.fail(f"started: {line}"))
    assert not what.out.exists()
    return str(error.value)


def test_bad_input_is_refused_before_any_training(tmp_path):
    assert "--search 1 is the config as it is" in refused(comparison(tmp_path, NEPA), 1)
    assert "search must be at least 1" in refused(comparison(tmp_path, NEPA), -2)
    assert "search_seed must be at least 0" in refused(comparison(tmp_path, NEPA), 2, -1)
    assert "search_length must be in (0, 1]" in refused(comparison(tmp_path, NEPA), 2, 0, 1.5)
    endless = comparison(tmp_path, NEPA, overrides=["--trainer.max_steps", "9"])
    assert "--search_length is a part of epochs: leave --trainer.max_steps out" in refused(endless, 2, 0, 0.5)
    message = refused(comparison(tmp_path, NEPA, overrides=["--model.base_lr=1e-3"]), 2)
    assert "--search chooses model.base_lr: leave --model.base_lr out after --." in message


def test_a_shorter_search_has_a_part_of_the_epochs_of_pretraining_and_of_fine_tuning(tmp_path):
    seen, epochs = [], []

    def trials(what, say):
        seen.append(what)
        epochs.append([read_config(source)["trainer"]["max_epochs"] for source in what.sources])
        raise StopIteration

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nepa_plugin.comparison.search.compare", trials)
        own = EvaluationOptions(finetune=FinetuneOptions(epochs=5))
        what = comparison(tmp_path, NEPA, overrides=[], protocols=["finetune"], rows={"nepa_digits": own})
        for overrides in ([], ["--trainer.max_epochs", "7"], ["--trainer.max_epochs=1", "--model.ema_decay=0.9"]):
            with pytest.raises(StopIteration):
                search(replace(what, overrides=overrides), 2, 0, 0.5)
    for trial in seen:
        assert {trial.options_of(f"nepa_digits-trial{i}").finetune.epochs for i in range(2)} == {3}  # of 5
    assert epochs == [[10, 10], [20, 20], [20, 20]]  # where they are said for all, that is shortened
    overrides = [trial.overrides for trial in seen]
    assert overrides == [[], ["--trainer.max_epochs", "4"], ["--trainer.max_epochs=1", "--model.ema_decay=0.9"]]


def test_a_part_of_what_is_no_number_of_epochs_is_refused(tmp_path):
    for overrides in (["--trainer.max_epochs", "null"], ["--trainer.max_epochs=-1"]):
        with pytest.raises(ComparisonError, match=r"is a part of --trainer\.max_epochs: give that a number"):
            shorter_overrides(overrides, 0.5)
    for trainer in ({"max_epochs": "auto"}, {"max_epochs": 3, "max_steps": 9}, {}):
        with pytest.raises(ComparisonError, match=r"a\.yaml: --search_length is a part of trainer\.max_epochs"):
            shorter_config({"trainer": trainer}, 0.5, Path("a.yaml"))
    assert shorter_overrides(["--trainer.max_epochs=100"], 0.07) == ["--trainer.max_epochs=7"]
    assert shorter_config({"trainer": {"max_epochs": 1}}, 0.1, Path("a.yaml")) == {"trainer": {"max_epochs": 1}}


def test_runs_without_a_search_are_found_before_it_begins(tmp_path):
    what = comparison(tmp_path, NEPA)
    run = what.out / "nepa_digits" / "seed0"
    run.mkdir(parents=True)
    write_json(*request_of(Run("nepa_digits", 0, run), what.arguments(NEPA, 0)))
    with pytest.raises(ComparisonError, match=r"nepa_digits was trained without a search, .*: choose another --out\."):
        search(what, 2, 0, say=lambda line: pytest.fail(f"started: {line}"))


def test_the_best_trial_is_taken_and_the_first_of_several():
    found = Search(
        3, 0, "knn", (8, 2), {"a": [Trial({}, 50.0), Trial({"base_lr": 1.0}), Trial({"base_lr": 2.0}, 50.0)]}
    )
    assert found.best("a") == Trial({}, 50.0)
    table = search_table(found)
    assert table.rows == [["a", "the config as it is", "50.0", "50.0", "50.0"]]
    assert "trained on 8 of the training images and scored by kNN on the other 2. The best" in table.note
    assert "on the other 2, in 0.5 of the epochs. The best" in search_table(replace(found, length=0.5)).note
    with pytest.raises(ComparisonError, match="every trial of the search failed"):
        Search(1, 0, "knn", (8, 2), {"a": [Trial({})]}).best("a")


@pytest.mark.slow
def test_a_search_and_the_comparison_after_it(tmp_path):
    what = comparison(tmp_path, NEPA, overrides=SHORT, protocols=["knn", "linear"])
    lines = []
    chosen, found = search(what, 2, 0, say=lines.append)
    assert found.column == "linear" and [trial.top1 is not None for trial in found.trials["nepa_digits"]] == [True] * 2
    best = found.best("nepa_digits")
    config = read_config(chosen.sources[0])
    for name, value in best.options.items():
        assert config["model"]["init_args"][name] == value
    for i, trial in enumerate(found.trials["nepa_digits"]):
        folder = what.out / "search" / "runs" / f"nepa_digits-trial{i}" / "seed0"
        results = json.loads((folder / "evaluation" / "results.json").read_text())
        assert results["protocols"]["linear"]["top1"] == trial.top1
        assert (results["data"]["train_images"], results["data"]["val_images"]) == found.images
        assert json.loads((folder / "summary.json").read_text())["train_images"] == found.images[0]
    # again: nothing is trained, and the same is found
    again = []
    assert search(what, 2, 0, say=again.append)[1] == found and not any(line.endswith(": training") for line in again)
    assert sum(line.endswith(": training") for line in lines) == 2
    runs = compare(chosen, lambda line: None)
    assert [run.name for run in runs] == ["nepa_digits", "untrained NepaViT causal"]
    assert runs[0].summary["train_images"] == TRAINING_DIGITS
    # and again, with what came after the search there: it goes on
    lines = []
    chosen_again, found_again = search(what, 2, 0, say=lambda line: None)
    again = compare(chosen_again, lines.append)
    tops = [[entry["top1"] for entry in run.results.values()] for run in (*again, *runs)]
    assert found_again == found and tops[: len(runs)] == tops[len(runs) :]
    assert not any(line.endswith(": training") or "evaluating" in line for line in lines)
    write_report(runs, what.out, "nepa compare --search 2", others=[search_table(found)])
    assert "## Search" in (what.out / "report.md").read_text()
