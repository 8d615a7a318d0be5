"""The options of an evaluation, from a config of ``nepa finetune`` and from the command line, for all rows or one."""

from dataclasses import fields

import pytest

from nepa_plugin.commands import compare as compare_command
from nepa_plugin.commands.evaluation_options import Parser, add_options, options_of, recipe_options, split_recipe
from nepa_plugin.comparison import Comparison
from nepa_plugin.finetuning import Recipe
from nepa_plugin.runtime import shipped
from nepa_plugin.training.configs import ConfigFileError, merge, read_config
from nepa_plugin.training.finetune import base_config


def read(*args):
    parser = Parser()
    add_options(parser)
    recipe, typed = split_recipe(args)
    return options_of(parser, parser.parse_args(recipe + typed))


@pytest.mark.parametrize("name", shipped.configs("lightly_configs/finetune"))
def test_a_recipe_is_what_the_config_says_and_else_the_defaults(name):
    config = merge(read_config(base_config()), read_config(name, "lightly_configs/finetune"))
    options = read("--recipe", name)
    assert options.finetune.epochs == config["trainer"]["max_epochs"]
    assert options.finetune.batch_size == config["global_batch_size"]
    expected = {field.name: getattr(Recipe(), field.name) for field in fields(Recipe)} | config["model"]
    found = {field.name: getattr(options.finetune, field.name) for field in fields(Recipe)}
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in expected.items()
    }
    assert (options.crop_pct, options.crop_mode) == tuple(
        config["data"].get(key, default) for key, default in (("crop_pct", None), ("crop_mode", "center"))
    )


def test_what_is_typed_is_in_force_wherever_it_stands():
    for args in (("--finetune.lr=1e-4", "--recipe", "vit_digits"), ("--recipe=vit_digits", "--finetune.lr", "1e-4")):
        options = read(*args)
        assert options.precision == "auto"
        assert options.finetune.lr == 1e-4 and options.finetune.mixup == 0.0 and options.finetune.batch_size == 64


def test_a_recipes_precision_is_that_of_the_evaluation(tmp_path):
    (tmp_path / "own.yaml").write_text("trainer: {precision: bf16-mixed}\n")
    assert read("--recipe", str(tmp_path / "own.yaml")).precision == "bf16-mixed"


def test_what_an_evaluation_cannot_do_is_refused(tmp_path):
    (tmp_path / "own.yaml").write_text("trainer: {limit_train_batches: 3}\nmodel: {lr: 1e-3, init_from: x}\n")
    with pytest.raises(ConfigFileError, match=r"own.yaml: an evaluation cannot take model.init_from, trainer.l"):
        recipe_options(str(tmp_path / "own.yaml"))
    with pytest.raises(ConfigFileError, match="The nearest: vit_digits"):
        recipe_options("vit_digit")
    with pytest.raises(ConfigFileError, match="give a config of nepa finetune"):
        split_recipe(["--recipe"])


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What ``nepa compare`` would compare."""
    found = []

    def stop(what):
        found.append(what)
        raise ValueError("enough")

    def call(*args):
        with pytest.raises(SystemExit):
            compare_command.main(["--data", "digits", "--out", str(tmp_path / "out"), *args])
        return found.pop() if found else None

    monkeypatch.setattr(compare_command, "compare", stop)
    return call


def test_compare_takes_them_for_all_rows_and_for_one(asked):
    what: Comparison = asked(
        *("a.yaml", "b.yaml", "--recipe", "vit_digits", "--finetune.epochs", "7", "--k", "3"),
        *("--row", "b:finetune.lr=0.5", "--row", "b:finetune.attention=null", "--", "--trainer.max_epochs", "1"),
    )
    assert list(what.sources) == ["a.yaml", "b.yaml"] and list(what.overrides) == ["--trainer.max_epochs", "1"]
    common, own = what.options_of("a"), what.options_of("b")
    assert common is what.options and (common.k, common.finetune.epochs, common.finetune.mixup) == (3, 7, 0.0)
    assert (own.k, own.finetune.epochs, own.finetune.lr, own.finetune.attention) == (3, 7, 0.5, None)
    assert common.finetune.lr != 0.5 and common.finetune.attention == "bidirectional"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--row", "b"], "--row b: write it as NAME:OPTION=VALUE"),
        (["--row", "b:finetune.lr"], "write it as NAME:OPTION=VALUE"),
        (["--finetune.lrr", "1"], "finetune.lrr"),
        (["--finetune.lr", "0"], "finetune.lr must be in (0, 1e+30], got 0.0."),
        (["--row", "b:finetune.lr=0"], "finetune.lr must be in (0, 1e+30], got 0.0."),
        (["--recipe", "gone"], "No config file at gone"),
    ],
)
def test_bad_options_are_one_line(args, message, asked, capsys):
    assert asked("a.yaml", *args) is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
