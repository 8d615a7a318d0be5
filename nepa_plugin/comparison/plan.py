"""What is compared: the runs to train, those that are trained already, and what is wrong, before anything long."""

import contextlib
import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml
from jsonargparse import get_loader

from nepa_plugin.data.evaluation import evaluation_folders
from nepa_plugin.data.files import fingerprint
from nepa_plugin.data.module import ImageData
from nepa_plugin.evaluation import EvaluationOptions, check_evaluation
from nepa_plugin.evaluation.options import Seed
from nepa_plugin.runtime.places import check_folder
from nepa_plugin.runtime.ranges import PositiveInt, check_hints, check_ranges
from nepa_plugin.runtime.reading import FileContentError, read_json, read_yaml_text
from nepa_plugin.training.configs import read_config
from nepa_plugin.training.curves import read_metrics

SUMMARY, REQUEST = "summary.json", "request.json"
#: How the names of rows with fresh weights begin.
UNTRAINED = "untrained "
#: What the report reads of a run's summary, and of which type it is.
SUMMARY_TYPES: dict[str, Any] = (
    dict.fromkeys(("train_fingerprint", "backbone_class", "attention", "exported", "devices", "precision"), str)
    | dict.fromkeys(("backbone", "hardware", "versions"), dict)
    | dict.fromkeys(("seed", "train_images", "global_batch_size", "images_seen", "backbone_parameters"), int)
    | dict.fromkeys(
        ("epochs", "seconds", "peak_memory_bytes", "views", "encoder_passes", "encoder_tokens"), (int, float)
    )
    | dict.fromkeys(("gflops", "discarded_parameters"), (int, float))
    | {"train_dir": (str, type(None)), "images_per_second": (int, float, type(None))}
)


class ComparisonError(ValueError):
    """A comparison cannot be made as asked; the message says what to do."""


@dataclass
class Run:
    """A pretrained (or untrained) backbone, its cost and its scores.

    Attributes:
        name: What the row is called: the name of the config, or of the run's folder.
        seed: Seed of the run.
        folder: The run's folder.
        summary: Its ``summary.json``; empty for an untrained backbone.
        config: Its ``config.yaml``; empty for an untrained backbone.
        results: Evaluation results by protocol.
        curves: Its ``metrics.csv``: name -> [(step, value), ...].
        attention: What its attention is like, by kind a number per layer, where that was looked at.
        error: Why it failed, if it did.
    """

    name: str
    seed: int
    folder: Path
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    attention: dict[str, list[float]] = field(default_factory=dict)
    error: str | None = None

    @property
    def trained(self) -> bool:
        """Whether there is a pretraining run behind it."""
        return bool(self.summary)


@dataclass(frozen=True)
class Comparison:
    """What to compare.

    Attributes:
        sources: Config files, or folders of finished runs.
        out: Folder of the comparison.
        data: ``"digits"``, or a folder that holds ``train`` and ``val`` (or ``test``), a sub-folder per class.
        protocols: Names of evaluation protocols.
        seeds: Seeds that each config is trained with.
        overrides: Further arguments of ``tools/pretrain.py`` for every config.
        options: Of the evaluation.
        jobs: Runs that are at work at the same time, each with its share of the CPU's cores. With one, a run is
            evaluated in this process while the next trains; with several, each is trained, evaluated and segmented in
            processes of its own.
        rows: By the name of a row, the options of its evaluation where they are not ``options``.
        floors: Add the backbones with fresh weights.
        segmentation: An mmsegmentation config that every backbone is segmented with, frozen and fine-tuned.
        causal: Fine-tune NEPA's predictors with causal attention, too, in a column of its own.
        attention: Look at how the backbones attend.
    """

    sources: Sequence[str]
    out: Path
    data: str
    protocols: Sequence[str]
    seeds: Sequence[Seed]
    overrides: Sequence[str] = ()
    options: EvaluationOptions = field(default_factory=EvaluationOptions)
    jobs: PositiveInt = 1
    rows: Mapping[str, EvaluationOptions] = field(default_factory=dict)
    floors: bool = True
    segmentation: str | None = None
    causal: bool = False
    attention: bool = False

    def options_of(self, name: str) -> EvaluationOptions:
        """Return the options of a row's evaluation."""
        return self.rows.get(name, self.options)

    def arguments(self, config: Path, seed: int) -> list[str]:
        """Return the arguments of ``tools/pretrain.py`` for one run, without its folder."""
        args = ["--config", str(config)]
        if self.data != "digits":
            train, val = evaluation_folders(self.data)
            args += ["--data.demo", "null", "--data.train_dir", str(train), "--data.val_dir", str(val)]
        return [*args, "--seed_everything", str(seed), *self.overrides]


def plan(what: Comparison) -> list[tuple[Run, Path | None]]:
    """Return the runs of a comparison, each with the config it is to be trained with, if it is.

    Raises:
        ComparisonError: If a config, a run folder, or the data cannot be used.
    """
    check_hints({"jobs": PositiveInt, "seeds": list[Seed]}, {"jobs": what.jobs, "seeds": list(what.seeds)})
    if not what.seeds or len(set(what.seeds)) < len(what.seeds):
        raise ComparisonError(f"seeds: give one or several, each once, got {list(what.seeds)}.")
    if not what.sources:
        raise ComparisonError("Nothing to compare: give config files or folders of finished runs.")
    check_folder(what.out)
    images = check_evaluation(what.data, what.protocols, what.options)
    data = fingerprint(images.train)
    planned: list[tuple[Run, Path | None]] = []
    others: list[Path] = []
    for source in map(Path, what.sources):
        if source.is_dir():
            planned.append((_finished(source, data, what), None))
            continue
        read_config(source)
        problem = _problem(what.arguments(source, what.seeds[0]))
        if problem:
            raise ComparisonError(f"{source}: {problem}")
        for seed in what.seeds:
            run = Run(source.stem, seed, what.out / folder_name(source.stem) / f"seed{seed}")
            if not _as_requested(run, what.arguments(source, seed)):
                others.append(run.folder)
            elif (run.folder / SUMMARY).is_file():
                _check_images(run, data, what)
            planned.append((run, source))
    if others:
        raise ComparisonError(
            f"{', '.join(map(str, others))}: trained with another config or other options than now. Choose another "
            f"--out, or delete {'that folder' if len(others) == 1 else 'those folders'} and each FOLDER.{REQUEST} to "
            "train again."
        )
    known = list(dict.fromkeys(run.name for run, _ in planned))
    if odd := [name for name in what.rows if name not in known and not name.startswith(UNTRAINED)]:
        raise ComparisonError(f"--row {odd[0]}: there is no such row. The rows are {', '.join(known)}.")
    names = [(run.name, run.seed) for run, _ in planned]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        name, seed = sorted(twice)[0]
        raise ComparisonError(f"Two sources are called {name} with seed {seed}: rename one of them.")
    return planned


def _finished(folder: Path, data: str, what: Comparison) -> Run:
    if not (folder / SUMMARY).is_file() or not (folder / "backbone").is_dir():
        raise ComparisonError(
            f"{folder} is no finished run: it has no {SUMMARY} beside a backbone/. Finish it with --ckpt_path last, or "
            "give its config instead."
        )
    summary = read_summary(folder)
    if summary["train_fingerprint"] != data:
        raise ComparisonError(
            f"{folder} was trained on other images ({summary['train_images']} in {summary['train_dir']}) than those of "
            f"--data {what.data}: leave it out, or compare on its own data."
        )
    name = folder.resolve().parent.name if folder.name == f"seed{summary['seed']}" else folder.resolve().name
    run = Run(name, int(summary["seed"]), folder)
    load_run(run)
    return run


def _check_images(run: Run, data: str, what: Comparison) -> None:
    """Refuse a run that was trained on images that have changed since."""
    load_run(run)
    own = what.data == "digits" or any(argument.startswith("--data.") for argument in what.overrides)
    if not own and run.summary["train_fingerprint"] != data:
        raise ComparisonError(
            f"{run.folder} was trained on other images than those that are in {what.data} now: choose another --out, "
            f"or delete that folder and {run.folder.name}.{REQUEST} to train it again."
        )


def _problem(arguments: list[str]) -> str | None:
    """Return what is wrong with the arguments of a pretraining run, if anything is: names, types and ranges."""
    from nepa_plugin.training.cli import base_config, main
    from nepa_plugin.training.command import RANGES

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([*arguments, "--print_config"], base_config())
        except SystemExit as status:
            if status.code:
                lines = err.getvalue().strip().splitlines() or ["cannot be parsed"]
                return lines[-1].removeprefix("error: ")
    config = get_loader("yaml")(out.getvalue())
    model, data = config["model"], config["data"]
    flat = config | {f"{group}.{key}": value for group in ("trainer", "data") for key, value in config[group].items()}
    try:
        check_hints(RANGES, {name: flat.get(name) for name in RANGES})
        check_ranges(resolve_name(model["class_path"]), model["init_args"], "model.")
        check_ranges(ImageData, data, "data.")
    except ValueError as error:
        return str(error)
    return None


def request_of(run: Run, arguments: list[str]) -> tuple[Path, dict[str, Any]]:
    """Return where it is written what a run was asked to be, and what that is."""
    _, config, *options = arguments
    return run.folder.parent / f"{run.folder.name}.{REQUEST}", {"arguments": options, "config": read_config(config)}


def _as_requested(run: Run, arguments: list[str]) -> bool:
    """Return whether a run is, or can become, what is asked for now; runs of other options are not mixed in.

    Raises:
        ComparisonError: If its folder is no comparison's.
    """
    path, wanted = request_of(run, arguments)
    if not path.is_file():
        if run.folder.exists():
            raise ComparisonError(f"{run.folder} is not part of a comparison: choose another --out.")
        return True
    remedy = f"Choose another --out, or delete it and {run.folder} to train that run again."
    return read_json(path, {"arguments": list, "config": dict}, remedy) == wanted


def load_run(run: Run) -> None:
    """Read what a finished run says of itself, its config and its curves.

    Raises:
        FileContentError: If one of its files is damaged.
    """
    run.summary = read_summary(run.folder)
    load_logged(run)


def load_logged(run: Run) -> None:
    """Read a run's config and curves, as far as they are there.

    Raises:
        FileContentError: If one of the files is damaged.
    """
    configs = sorted(run.folder.glob("config*.yaml"), key=lambda path: path.stat().st_mtime)
    run.config = _read_config(configs[-1]) if configs else {}
    if (metrics := run.folder / "metrics.csv").is_file():
        try:
            run.curves = read_metrics(metrics)
        except (ValueError, TypeError, KeyError, csv.Error) as error:
            raise FileContentError(f"{metrics} is damaged: {error}. Delete it, and the curves are left out.") from error


def _read_config(path: Path) -> dict[str, Any]:
    """Return what a run was trained with; of its method, what the report looks at is checked."""
    try:
        config = yaml.safe_load(read_yaml_text(path))
    except (yaml.YAMLError, ValueError) as error:
        raise FileContentError(f"{path} is damaged: {error} Delete it, and the report goes without it.") from error
    groups = config, *(_get(config, *keys) for keys in (("model",), ("model", "init_args")))
    if not all(isinstance(group, dict) for group in groups):
        raise FileContentError(
            f"{path} is damaged: it holds no model.init_args. Delete it, and the report goes without it."
        )
    return dict(config)


def _get(config: Any, *keys: str) -> Any:
    for key in keys:
        config = config.get(key, {}) if isinstance(config, dict) else None
    return config


def read_summary(folder: Path) -> dict[str, Any]:
    """Return what a finished run says of itself.

    Raises:
        FileContentError: If the file is damaged, or lacks something that the report needs.
    """
    path, remedy = folder / SUMMARY, "Leave the run out, or train it again."
    summary = read_json(path, SUMMARY_TYPES, remedy)
    for group, key, kind in (
        ("backbone", "architecture", str),
        ("hardware", "threads", int),
        ("hardware", "gpus", list),
    ):
        if not isinstance(summary[group].get(key), kind):
            raise FileContentError(f"{path} is damaged: its {group!r} has no {key!r}. {remedy}")
    return summary


def folder_name(name: str) -> str:
    """Return a name, which may come from a run's files, as that of a single folder."""
    return re.sub(r"[/\\\x00-\x1f\x7f]", "_", name).lstrip(".")[:200] or "_"


def last_line(log: Path) -> str:
    """Return the last line of a log that says something."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""
