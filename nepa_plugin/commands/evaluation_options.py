"""Options of an evaluation on a command line, for the commands that evaluate."""

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from nepa_plugin.commands.naming import say_usage_error
from nepa_plugin.evaluation import EvaluationOptions
from nepa_plugin.finetuning import Recipe
from nepa_plugin.training.configs import ConfigFileError, merge, read_config
from nepa_plugin.training.finetune import FinetuneCLI, base_config

#: Keys of a config of ``nepa finetune`` that say nothing of what is scored.
_WITHOUT_EFFECT = {
    "": {"seed_everything", "checkpoint_every_n_steps", "run_dir", "compile"},
    "trainer": {"log_every_n_steps", "check_val_every_n_epoch"},
    "data": {"folder", "batch_size_per_device", "num_workers"},
    "model": set[str](),
}
_NAMES = {"global_batch_size": "finetune.batch_size", "trainer.max_epochs": "finetune.epochs"}
_NAMES |= {"data.crop_pct": "crop_pct", "data.crop_mode": "crop_mode", "trainer.precision": "precision"}
_NAMES |= {f"model.{field.name}": f"finetune.{field.name}" for field in fields(Recipe)}


class Parser(ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and exit with status 2."""
        say_usage_error(message)


def add_options(parser: Parser) -> None:
    """Add every option of an evaluation, but for the cache."""
    parser.add_class_arguments(EvaluationOptions, skip={"cache"})


def options_of(parser: Parser, given: Any, others: Sequence[str] = (), **kwargs: Any) -> EvaluationOptions:
    """Return the options that a parser has read.

    Args:
        parser: With :func:`add_options`.
        given: What it has read.
        others: Names in it that are no options of an evaluation.
        **kwargs: Further options.
    """
    chosen = parser.instantiate(given) if hasattr(parser, "instantiate") else parser.instantiate_classes(given)
    return EvaluationOptions(**{name: value for name, value in vars(chosen).items() if name not in others}, **kwargs)


def split_recipe(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take ``--recipe CONFIG`` out of a command line.

    Args:
        args: A command line.

    Returns:
        What a config of ``nepa finetune`` says, as options of an evaluation, and the rest. With the first before the
        rest, an option that is typed is the one in force.

    Raises:
        ConfigFileError: If there is no such config, or it holds something that an evaluation cannot do.
    """
    recipes: list[str] = []
    others: list[str] = []
    left = iter(args)
    for arg in left:
        option, equals, value = arg.partition("=")
        if option != "--recipe":
            others.append(arg)
            continue
        config = value if equals else next(left, None)
        if config is None:
            raise ConfigFileError("--recipe: give a config of nepa finetune, such as vit_digits.")
        recipes += recipe_options(config)
    return recipes, others


def recipe_options(config: str) -> list[str]:
    """Return what a config of ``nepa finetune`` says, with what it builds on, as ``--finetune.lr=0.001`` and so on.

    Raises:
        ConfigFileError: As :func:`split_recipe`.
    """
    given = merge(read_config(base_config()), read_config(config, FinetuneCLI.configs))
    flat: dict[str, Any] = {}
    for key, value in given.items():
        if key in ("trainer", "data", "model") and isinstance(value, dict):
            flat |= {f"{key}.{name}": inner for name, inner in value.items() if name not in _WITHOUT_EFFECT[key]}
        elif key not in _WITHOUT_EFFECT[""]:
            flat[key] = value
    if unknown := sorted(set(flat) - set(_NAMES)):
        raise ConfigFileError(f"--recipe {config}: an evaluation cannot take {', '.join(unknown)} from it.")
    return [f"--{_NAMES[key]}={value if isinstance(value, str) else json.dumps(value)}" for key, value in flat.items()]
