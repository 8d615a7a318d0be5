"""A small search for every method under one equal budget, on a part of the training images that is held out.

For each config so many trials are trained on four fifths of the training images and scored on the other fifth: the
config as it is, and others with a learning rate and one of the values that the method's paper tries. The best trial's
options take the config's place in the comparison. What was found is kept in ``OUT/search.json`` and in the report.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from pkgutil import resolve_name
from random import Random
from statistics import mean
from typing import Any

import yaml

from nepa_plugin.comparison.plan import Comparison, ComparisonError, folder_name, plan
from nepa_plugin.comparison.report.scores import COLUMNS, NAMES, values
from nepa_plugin.comparison.run import Say, compare
from nepa_plugin.comparison.shorter import sets_epochs, shorter_config, shorter_evaluation, shorter_overrides
from nepa_plugin.data.evaluation import evaluation_images
from nepa_plugin.data.files import fingerprint
from nepa_plugin.evaluation.readout import FOLDS
from nepa_plugin.runtime.files import write_json
from nepa_plugin.runtime.ranges import NonNegativeInt, PositiveFraction, PositiveInt, check_hints
from nepa_plugin.training.configs import merge, read_config

SEARCH = "search.json"
#: The learning rate is searched between so many times the config's and as many parts of it.
LR_SPAN = 4.0
#: Per method, the argument that its paper looks at first, and values about the published one.
KNOBS: dict[str, tuple[str, list[Any]]] = {
    "NEPA": ("crop_scale", [[0.08, 1.0], [0.2, 1.0], [0.5, 1.0]]),
    "MAE": ("mask_ratio", [0.5, 0.6, 0.75, 0.85]),
    "AIM": ("crop_scale", [[0.2, 1.0], [0.4, 1.0], [0.6, 1.0]]),
    "BEiT": ("mask_ratio", [0.3, 0.4, 0.5]),
    "IGPT": ("crop_scale", [[0.2, 1.0], [0.34, 0.77], [0.5, 1.0]]),
    "CPC": ("horizon", [2, 5, 8]),
    "IJEPA": ("target_scale", [[0.125, 0.15], [0.15, 0.2], [0.2, 0.25]]),
    "IBOT": ("mask_ratio", [[0.1, 0.3], [0.1, 0.5], [0.3, 0.5]]),
    "SimCLR": ("temperature", [0.05, 0.1, 0.2, 0.5]),
    "MoCoV3": ("momentum", [0.9, 0.99, 0.995]),
    "SimSiam": ("weight_decay", [0.01, 0.05, 0.1]),
    "BYOL": ("momentum", [0.9, 0.99, 0.996]),
    "DINO": ("momentum", [0.99, 0.996, 0.9995]),
    "LeJEPA": ("lambda_param", [0.02, 0.05, 0.1]),
}


@dataclass(frozen=True)
class Trial:
    """One choice of options, and what it reached.

    Attributes:
        options: Arguments of the method; none for the config as it is.
        top1: Accuracy in per cent on the held-out images; nothing where the trial failed.
    """

    options: dict[str, Any]
    top1: float | None = None


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        budget: Trials per config.
        seed: Of the choices and the trainings.
        column: What decided.
        images: How many images were trained on, and how many held out.
        trials: By the name of a config, the one as it is first.
        length: Part of the epochs, of pretraining and of fine-tuning, that a trial has.
    """

    budget: int
    seed: int
    column: str
    images: tuple[int, int]
    trials: dict[str, list[Trial]] = field(default_factory=dict)
    length: float = 1.0

    def best(self, name: str) -> Trial:
        """Return the best trial of a config, the first of several.

        Raises:
            ComparisonError: If all of its trials failed.
        """
        scored = [trial for trial in self.trials[name] if trial.top1 is not None]
        if not scored:
            raise ComparisonError(f"{name}: every trial of the search failed; the logs beside them say why.")
        return max(scored, key=lambda trial: trial.top1 or 0.0)


def choices(config: dict[str, Any], budget: int, rng: Random) -> list[dict[str, Any]]:
    """Return the arguments of each trial of a config, the config's own (none) first, no two alike.

    Args:
        config: As it is read, with its base.
        budget: Number of trials.
        rng: Draws them: the learning rate log-uniform about the config's, a knob's value uniform.
    """
    method = resolve_name(config["model"]["class_path"])
    knob = next((KNOBS[cls.__name__] for cls in method.__mro__ if cls.__name__ in KNOBS), None)
    args = config["model"].get("init_args") or {}
    lr = args.get("base_lr", _default(method, "base_lr"))
    if not isinstance(lr, int | float):
        raise ComparisonError(f"--search tries learning rates about the config's, and base_lr is {lr}: give a number.")
    found: list[dict[str, Any]] = [{}]
    while len(found) < budget:
        options = {"base_lr": float(f"{lr * math.exp(rng.uniform(-1, 1) * math.log(LR_SPAN)):.2g}")}
        if knob is not None:
            options[knob[0]] = rng.choice(knob[1])
        if options not in found:
            found.append(options)
    return found


def _default(method: type, name: str) -> Any:
    """Return the default of a constructor's argument, of the nearest class that names it."""
    from inspect import signature

    for cls in method.__mro__:
        parameters = signature(cls.__init__).parameters  # type: ignore[misc]
        if name in parameters:
            return parameters[name].default
    raise ComparisonError(f"{method.__name__} has no {name} to search.")


def search(
    what: Comparison, budget: int, seed: int = 0, length: float = 1.0, say: Say | None = None
) -> tuple[Comparison, Search]:
    """Search every config of a comparison, and return the comparison of what was found.

    A search that was stopped goes on where it was.

    Args:
        what: The comparison; folders of finished runs in it are left as they are.
        budget: Trials per config, at least two.
        seed: Of the choices and of every training.
        length: Part of its epochs, of pretraining and of fine-tuning, that a trial has; at least one epoch.
        say: Called with a line of progress.

    Returns:
        The comparison with the best trial's config in place of each config, and what the search found.

    Raises:
        ComparisonError: If something cannot be used, or every trial of a config failed.
    """
    hints = {"search": PositiveInt, "search_seed": NonNegativeInt, "search_length": PositiveFraction}
    check_hints(hints, {"search": budget, "search_seed": seed, "search_length": length})
    if budget < 2:
        raise ComparisonError("--search 1 is the config as it is: give two trials or more, or leave it out.")
    # the runs after a search have its choice, so they are not compared with the configs as they are
    planned = plan(replace(what, out=what.out / "search"))
    sources = {run.name: config for run, config in planned if config is not None}
    if not sources:
        raise ComparisonError("--search needs configs to train; folders of finished runs are finished.")
    if not (what.out / SEARCH).is_file() and (there := [n for n in sources if (what.out / folder_name(n)).exists()]):
        raise ComparisonError(
            f"{what.out / folder_name(there[0])} was trained without a search, whose choice may be another: choose "
            "another --out."
        )
    configs = {name: read_config(source) for name, source in sources.items()}
    wanted = {name: choices(config, budget, Random(f"{seed} {name}")) for name, config in configs.items()}
    _check_overrides(what.overrides, wanted)
    overrides, shorter = what.overrides, configs
    if length < 1 and sets_epochs(overrides):
        overrides = shorter_overrides(overrides, length)
    elif length < 1:
        shorter = {name: shorter_config(config, length, sources[name]) for name, config in configs.items()}
    data, counts = _held_out(what)
    column = next(column for column in COLUMNS if column in what.protocols)
    written: list[str] = []
    for name, trials in wanted.items():
        for i, options in enumerate(trials):
            written.append(str(_write(what.out / "search" / "configs", f"{name}-trial{i}", shorter[name], options)))
    rows = {
        f"{name}-trial{i}": shorter_evaluation(what.options_of(name), length) for name in wanted for i in range(budget)
    }
    trained = compare(
        replace(
            what,
            sources=written,
            out=what.out / "search" / "runs",
            data=str(data),
            protocols=[column],
            seeds=[seed],
            overrides=overrides,
            rows=rows,
            floors=False,
            segmentation=None,
        ),
        say,
    )
    scores = values(trained, column)
    found = Search(budget, seed, column, counts, length=length)
    for name, trials in wanted.items():
        own = [scores.get(f"{name}-trial{i}") for i in range(len(trials))]
        found.trials[name] = [
            Trial(options, mean(top1) if top1 else None) for options, top1 in zip(trials, own, strict=True)
        ]
    write_json(what.out / SEARCH, asdict(found))
    chosen = {
        name: _write(what.out / "search" / "chosen", name, config, found.best(name).options)
        for name, config in configs.items()
    }
    taken = [str(chosen[Path(source).stem]) if not Path(source).is_dir() else str(source) for source in what.sources]
    return replace(what, sources=taken), found


def describe(found: Search) -> str:
    """Return what the search was, in a sentence."""
    trained, held = found.images
    length = f", in {found.length:g} of the epochs" if found.length < 1 else ""
    return (
        f"{found.budget} trials per config, seed {found.seed}, each trained on {trained} of the training images and "
        f"scored by {NAMES[found.column]} on the other {held}{length}. "
        "The best trial's options were then trained on all."
    )


def _check_overrides(overrides: Sequence[str], wanted: dict[str, list[dict[str, Any]]]) -> None:
    searched = {name for trials in wanted.values() for options in trials for name in options}
    for argument in overrides:
        name = argument.partition("=")[0].removeprefix("--model.").removeprefix("init_args.")
        if argument.startswith("--model.") and name in searched:
            raise ComparisonError(f"--search chooses model.{name}: leave {argument.partition('=')[0]} out after --.")


def _write(folder: Path, name: str, config: dict[str, Any], options: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{folder_name(name)}.yaml"
    path.write_text(yaml.safe_dump(merge(config, {"model": {"init_args": options}}), sort_keys=False))
    return path


def _held_out(what: Comparison) -> tuple[Path, tuple[int, int]]:
    """Return a folder of links to the training images: every fifth of each class to score, the others to train on."""
    images, _ = evaluation_images(what.data, what.options.max_image_pixels)
    if not hasattr(images.dataset, "samples"):
        raise ComparisonError("--search divides a folder of images, not a table: leave --search out.")
    folder = what.out / "search" / "data"
    classes: dict[str, list[Path]] = {name: [] for name in images.dataset.classes}
    for path, target in images.dataset.samples:
        classes[images.dataset.classes[target]].append(Path(path).resolve())
    few = [name for name, files in classes.items() if len(files) < FOLDS]
    if few:
        raise ComparisonError(f"--search holds every fifth image out, and class {few[0]} has fewer than {FOLDS}.")
    wanted = {
        folder / ("val" if i % FOLDS == FOLDS - 1 else "train") / name / f"{i:07d}{path.suffix}": path
        for name, files in classes.items()
        for i, path in enumerate(files)
    }
    mark = folder.parent / "data.txt"
    content = f"{fingerprint(images)} {len(wanted)}"
    if not mark.is_file() or mark.read_text() != content:
        shutil.rmtree(folder, ignore_errors=True)
        for link, path in wanted.items():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
        mark.write_text(content)
    held = sum(link.parent.parent.name == "val" for link in wanted)
    return folder, (len(wanted) - held, held)
