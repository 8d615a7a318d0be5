"""Trials of a search that are shorter than what is then compared: a part of the epochs."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nepa_plugin.comparison.plan import ComparisonError
from nepa_plugin.evaluation import EvaluationOptions
from nepa_plugin.training.configs import merge

MAX_EPOCHS, MAX_STEPS = "--trainer.max_epochs", "--trainer.max_steps"


def _part(epochs: int, length: float) -> int:
    """Return so much of the epochs, rounded up: 0.07 of 100 are 7, though the product of floats is a little more."""
    return max(1, math.ceil(round(epochs * length, 9)))


def sets_epochs(overrides: Sequence[str]) -> bool:
    """Return whether arguments of a pretraining run say how long it is, whatever its config says."""
    return any(argument.partition("=")[0] in (MAX_EPOCHS, MAX_STEPS) for argument in overrides)


def shorter_config(config: dict[str, Any], length: float, source: Path) -> dict[str, Any]:
    """Return a config with a part of its epochs, at least one.

    Args:
        config: As it is read, with its base.
        length: The part.
        source: Its file, for the error.

    Raises:
        ComparisonError: If it does not say its epochs.
    """
    trainer = config.get("trainer") or {}
    epochs = trainer.get("max_epochs")
    if not isinstance(epochs, int) or epochs < 1 or trainer.get("max_steps", -1) != -1:
        raise ComparisonError(
            f"{source}: --search_length is a part of trainer.max_epochs: give that a number, and no max_steps."
        )
    return merge(config, {"trainer": {"max_epochs": _part(epochs, length)}})


def shorter_overrides(overrides: Sequence[str], length: float) -> list[str]:
    """Return arguments of a pretraining run with a part of the epochs that they ask for, at least one.

    Args:
        overrides: ``--trainer.max_epochs=N`` or ``--trainer.max_epochs N`` among them.
        length: The part.

    Raises:
        ComparisonError: If what they ask for is not a number of epochs.
    """
    found = list(overrides)
    for i, argument in enumerate(overrides):
        name, equals, value = argument.partition("=")
        if name == MAX_STEPS:
            raise ComparisonError(f"--search_length is a part of epochs: leave {name} out after --.")
        if name != MAX_EPOCHS:
            continue
        value = value if equals else "".join(overrides[i + 1 : i + 2])
        if not value.isdecimal() or int(value) < 1:
            raise ComparisonError(f"--search_length is a part of {MAX_EPOCHS}: give that a number after --.")
        epochs = str(_part(int(value), length))
        found[i if equals else i + 1] = f"{name}={epochs}" if equals else epochs
    return found


def shorter_evaluation(options: EvaluationOptions, length: float) -> EvaluationOptions:
    """Return options with a part of the epochs of fine-tuning, at least one."""
    tuning = options.finetune
    return replace(options, finetune=replace(tuning, epochs=_part(tuning.epochs, length)))
