"""Several methods on equal terms: train each config, evaluate each the same way, and collect what a report needs.

A comparison lives in one folder and goes on where it stopped: ``OUT/CONFIG/seed0`` is a pretraining run, with its
evaluation in ``evaluation/``; ``OUT/untrained/...`` are the same backbones with fresh weights, as a floor.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from nepa_plugin.checkpoints import load_backbone, save_backbone, untrained_like
from nepa_plugin.data.evaluation import evaluation_folders, evaluation_images
from nepa_plugin.data.files import content_fingerprint, fingerprint
from nepa_plugin.evaluation import EvaluationOptions, check_evaluation, evaluate, read_results
from nepa_plugin.evaluation.options import Seed
from nepa_plugin.evaluation.results import put_aside
from nepa_plugin.runtime.files import write_json
from nepa_plugin.runtime.places import check_folder
from nepa_plugin.runtime.ranges import PositiveInt, check_hints
from nepa_plugin.runtime.reading import read_json, read_yaml_text
from nepa_plugin.training.configs import read_config
from nepa_plugin.training.curves import read_metrics

SUMMARY, REQUEST = "summary.json", "request.json"


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
        error: Why it failed, if it did.
    """

    name: str
    seed: int
    folder: Path
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
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
        jobs: Runs that are trained at the same time, each with its share of the CPU's cores.
    """

    sources: Sequence[str]
    out: Path
    data: str
    protocols: Sequence[str]
    seeds: Sequence[Seed]
    overrides: Sequence[str] = ()
    options: EvaluationOptions = field(default_factory=EvaluationOptions)
    jobs: PositiveInt = 1

    def arguments(self, config: Path, seed: int) -> list[str]:
        """Return the arguments of ``tools/pretrain.py`` for one run, without its folder."""
        args = ["--config", str(config)]
        if self.data != "digits":
            train, val = evaluation_folders(self.data)
            args += ["--data.demo", "null", "--data.train_dir", str(train), "--data.val_dir", str(val)]
        return [*args, "--seed_everything", str(seed), *self.overrides]


Say = Callable[[str], None]


def compare(what: Comparison, say: Say | None = None) -> list[Run]:
    """Train what is not trained yet, evaluate what is not evaluated yet, and return all rows.

    A run that fails is kept with its error, and the others go on.

    Args:
        what: The comparison.
        say: Called with a line of progress; prints by default.

    Returns:
        The runs in the order of ``sources``, then the untrained backbones.

    Raises:
        ComparisonError: Before any training, if a config, a run folder, or the data cannot be used.
    """
    say = say or Console(highlight=False, soft_wrap=True, markup=False).print
    planned = _plan(what)
    runs, places = [], [f"[{i + 1}/{len(planned)}] {run.name}, seed {run.seed}: " for i, (run, _) in enumerate(planned)]
    pool = ThreadPoolExecutor(what.jobs)  # the threads only wait for the processes that train
    trainings = [
        pool.submit(_train, run, what.arguments(config, run.seed), place, say, what.jobs) if config else None
        for (run, config), place in zip(planned, places, strict=True)
    ]
    try:
        for (run, _), place, training in zip(planned, places, trainings, strict=True):
            if training is not None:
                training.result()
            if run.error is None:
                _load(run)
                _evaluate(run, what, place, say)
            if run.error is not None:
                say(f"{place}FAILED: {run.error}")
            runs.append(run)
    finally:  # after Ctrl-C, what has not begun must not begin
        pool.shutdown(cancel_futures=True)
    for run in _untrained(runs, what):
        _evaluate(run, what, f"{run.name}, seed {run.seed}: ", say)
        runs.append(run)
    return runs


# -- before anything long ----------------------------------------------------------------------------------------------


def _plan(what: Comparison) -> list[tuple[Run, Path | None]]:
    check_hints({"jobs": PositiveInt, "seeds": list[Seed]}, {"jobs": what.jobs, "seeds": list(what.seeds)})
    if not what.seeds or len(set(what.seeds)) < len(what.seeds):
        raise ComparisonError(f"seeds: give one or several, each once, got {list(what.seeds)}.")
    if not what.sources:
        raise ComparisonError("Nothing to compare: give config files or folders of finished runs.")
    check_folder(what.out)
    images = check_evaluation(what.data, what.protocols, what.options)
    data = fingerprint(images.train)
    planned: list[tuple[Run, Path | None]] = []
    for source in map(Path, what.sources):
        if source.is_dir():
            planned.append((_finished(source, data, what), None))
            continue
        read_config(source)
        problem = _parse(what.arguments(source, what.seeds[0]))
        if problem:
            raise ComparisonError(f"{source}: {problem}")
        for seed in what.seeds:
            run = Run(source.stem, seed, what.out / folder_name(source.stem) / f"seed{seed}")
            _check_request(run, what.arguments(source, seed))
            planned.append((run, source))
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
    summary = json.loads((folder / SUMMARY).read_text())
    if summary["train_fingerprint"] != data:
        raise ComparisonError(
            f"{folder} was trained on other images ({summary['train_images']} in {summary['train_dir']}) than those of "
            f"--data {what.data}: leave it out, or compare on its own data."
        )
    name = folder.resolve().parent.name if folder.name == f"seed{summary['seed']}" else folder.resolve().name
    return Run(name, int(summary["seed"]), folder)


def _parse(arguments: list[str]) -> str | None:
    """Return what is wrong with the arguments of a pretraining run, if anything is."""
    from nepa_plugin.training.cli import base_config, main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([*arguments, "--print_config"], base_config())
        except SystemExit as status:
            if status.code == 0:
                return None
    lines = err.getvalue().strip().splitlines() or ["cannot be parsed"]
    return lines[-1].removeprefix("error: ")


def _request(run: Run, arguments: list[str]) -> tuple[Path, dict[str, Any]]:
    """Return where it is written what a run was asked to be, and what that is."""
    _, config, *options = arguments
    return run.folder.parent / f"{run.folder.name}.{REQUEST}", {"arguments": options, "config": read_config(config)}


def _check_request(run: Run, arguments: list[str]) -> None:
    """Refuse to mix runs of other options into a comparison."""
    path, wanted = _request(run, arguments)
    if not path.is_file():
        if run.folder.exists():
            raise ComparisonError(f"{run.folder} is not part of a comparison: choose another --out.")
        return
    if json.loads(path.read_text()) != wanted:
        raise ComparisonError(
            f"{run.folder} was trained with another config or other options than now: choose another --out, or delete "
            f"that folder and {path.name} to train it again."
        )


# -- training and evaluation -------------------------------------------------------------------------------------------


def _train(run: Run, arguments: list[str], place: str, say: Say, jobs: int) -> None:
    if (run.folder / SUMMARY).is_file():
        say(f"{place}trained already")
        return
    say(f"{place}training")
    write_json(*_request(run, arguments))
    log = run.folder.parent / f"{run.folder.name}.log"
    # A process of its own: its peak memory and time are its own, and its end is not that of the comparison.
    # A module and not -c, so that Lightning can start it again for each further device.
    command = [sys.executable, "-m", "nepa_plugin.training.cli", *arguments]
    command += ["--run_dir", str(run.folder), "--ckpt_path", "auto"]
    environment = dict(os.environ)
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    with log.open("a") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if status or not (run.folder / SUMMARY).is_file():
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        run.error = f"training ended with status {status}: {lines[-1] if lines else ''} (see {log})"


def _load(run: Run) -> None:
    run.summary = json.loads((run.folder / SUMMARY).read_text())
    configs = sorted(run.folder.glob("config*.yaml"), key=lambda path: path.stat().st_mtime)
    run.config = yaml.safe_load(read_yaml_text(configs[-1])) if configs else {}
    if (run.folder / "metrics.csv").is_file():
        run.curves = read_metrics(run.folder / "metrics.csv")


def _evaluate(run: Run, what: Comparison, place: str, say: Say) -> None:
    out, asked = run.folder / "evaluation", json.loads(json.dumps({"data": what.data, **asdict(what.options)}))
    record = out / REQUEST
    try:
        done = _done(out, record, asked, what)
        missing = [name for name in what.protocols if name not in done]
        if missing:
            say(f"{place}evaluating {', '.join(missing)}")
            write_json(record, asked)
            done = done | evaluate(run.folder / "backbone", what.data, missing, what.options, out)["protocols"]
    except Exception as error:  # whatever it is, the other rows go on
        (run.folder / "evaluation.log").write_text(traceback.format_exc())
        run.error = f"evaluation: {error} (see {run.folder / 'evaluation.log'})"
        return
    run.results = {name: done[name] for name in what.protocols}
    scores = [f"{name} {result['top1']:.1f}" for name, result in run.results.items() if "top1" in result]
    say(f"{place}{'  '.join(scores)}")


def _done(out: Path, record: Path, asked: dict[str, Any], what: Comparison) -> dict[str, Any]:
    """Return the results that there are of what is asked, on the images that there are now; put others aside."""
    results = read_results(out)
    if results is None:
        return {}
    train, val = evaluation_images(what.data, what.options.max_image_pixels)
    now = {"train": content_fingerprint(train), "val": content_fingerprint(val)}
    same_images = results["data"].get("images_sha256", now) == now
    if same_images and record.is_file() and read_json(record, {}, f"Remove {out}.") == asked:
        return dict(results["protocols"])
    if not same_images:
        put_aside(out)
    return {}


def _untrained(runs: list[Run], what: Comparison) -> list[Run]:
    """Write each distinct backbone of the comparison with fresh weights, once per seed."""
    floors: dict[tuple[str, int], Run] = {}
    backbones: dict[str, list[Any]] = {}
    for run in runs:
        if not run.trained:
            continue
        mode = f" {run.summary['attention']}" if run.summary["backbone_class"] == "NepaViT" else ""
        name = f"untrained {run.summary['backbone_class']}{mode}"
        same = backbones.setdefault(name, [])
        backbone = _architecture(run.summary["backbone"])
        if backbone not in same:
            same.append(backbone)
        number = same.index(backbone) + 1
        name += f" {number}" if number > 1 else ""
        if (name, run.seed) in floors:
            continue
        floor = Run(name, run.seed, what.out / "untrained" / folder_name(name.replace(" ", "_")) / f"seed{run.seed}")
        if not (floor.folder / "backbone" / "model.safetensors").is_file():
            model = untrained_like(load_backbone(run.folder / "backbone"), seed=run.seed)
            save_backbone(model, floor.folder / "backbone", overwrite=True)
        floors[name, run.seed] = floor
    return sorted(floors.values(), key=lambda run: (run.name, run.seed))


def folder_name(name: str) -> str:
    """Return a name, which may come from a run's files, as that of a single folder."""
    return re.sub(r"[/\\\x00-\x1f\x7f]", "_", name).lstrip(".")[:200] or "_"


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    """Return what of a backbone's config its fresh weights depend on."""
    other = ("dynamic_img_size", "drop_path_rate")
    args = {key: value for key, value in config.get("model_args", {}).items() if key not in other}
    return {"architecture": config["architecture"], "model_args": args}
