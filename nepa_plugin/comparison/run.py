"""Several methods on equal terms: train each config, evaluate each the same way, and collect what a report needs.

A comparison lives in one folder and goes on where it stopped: ``OUT/CONFIG/seed0`` is a pretraining run, with its
evaluation in ``evaluation/``; ``OUT/untrained/...`` are the same backbones with fresh weights, as a floor.
"""

import contextlib
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from nepa_plugin.comparison.attention import look_at_attention
from nepa_plugin.comparison.child import PARENT
from nepa_plugin.comparison.evaluating import read_request, request_for
from nepa_plugin.comparison.floors import alike, untrained
from nepa_plugin.comparison.plan import (
    REQUEST,
    SUMMARY,
    Comparison,
    ComparisonError,
    Run,
    last_line,
    load_logged,
    load_run,
    plan,
    request_of,
)
from nepa_plugin.comparison.segment import MODES, check_segmentation, segment
from nepa_plugin.data.evaluation import evaluation_images
from nepa_plugin.data.files import content_fingerprint
from nepa_plugin.evaluation import EvaluationOptions, evaluate, read_results
from nepa_plugin.evaluation.results import put_aside
from nepa_plugin.runtime.boundary import in_words
from nepa_plugin.runtime.files import write_json
from nepa_plugin.runtime.locks import lock_folder
from nepa_plugin.runtime.reading import read_json

#: The column of fine-tuning with causal attention.
CAUSAL = "finetune_causal"
#: The columns of fine-tuning.
TUNED = ("finetune", CAUSAL)
#: What an evaluation prints and what became of it.
LOG = "evaluation.log"
#: Seconds that a training has for its last checkpoint when the comparison is ended.
SECONDS_TO_END = 60


Say = Callable[[str], None]


class Processes:
    """The processes that train, evaluate or segment now, so that they can be ended.

    Args:
        jobs: How many there may be at a time; each gets its share of the CPU's cores.
    """

    def __init__(self, jobs: int = 1) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ended = False
        self._environment = os.environ | {PARENT: str(os.getpid())}
        if jobs > 1:
            self._environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))

    def run(self, command: list[str], log: Path) -> int:
        """Start a process that writes to a log, wait for it and return its status; once all are ended, start none."""
        with self._lock:
            if self._ended:
                return 143
            with log.open("a") as file:
                process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=self._environment)
            self._running.add(process)
        status = process.wait()
        with self._lock:
            self._running.discard(process)
        return status

    def end(self) -> None:
        """End what is running: by SIGTERM, on which a training saves what it has, and if that takes long by SIGKILL."""
        with self._lock:
            self._ended = True
            running = list(self._running)
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()


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
        FolderInUseError: If another comparison is at work in the folder.
    """
    say = say or Console(highlight=False, soft_wrap=True, markup=False).print
    planned = plan(what)
    config = check_segmentation(what.segmentation) if what.segmentation else None
    with lock_folder(what.out, "--out") or contextlib.nullcontext():
        return _compare(what, planned, config, say)


def _compare(
    what: Comparison, planned: list[tuple[Run, Path | None]], segmentation: Path | None, say: Say
) -> list[Run]:
    places = [f"[{i + 1}/{len(planned)}] {run.name}, seed {run.seed}: " for i, (run, _) in enumerate(planned)]
    pool = ThreadPoolExecutor(what.jobs)  # the threads only wait for processes
    processes = Processes(what.jobs)
    # one job is the next run's training while this process evaluates; several train and evaluate apart
    apart = processes if what.jobs > 1 else None

    def score(run: Run, place: str, twin: Run | None = None) -> None:
        if run.error is None:
            _evaluate(run, what, place, say, apart, twin)
        if run.error is None and segmentation is not None:
            _segment(run, segmentation, place, say, processes)
        if run.error is not None:
            say(f"{place}FAILED: {run.error}")

    def train(run: Run, config: Path | None, place: str, loaded: threading.Event) -> None:
        try:
            if config is not None:
                _train(run, what.arguments(config, run.seed), place, say, processes)
            _load(run)
        finally:
            loaded.set()
        if apart is not None:
            score(run, place)

    def score_alike(group: list[Run]) -> None:
        group = _tuned_first(group, what)
        for run in group:
            score(run, f"{run.name}, seed {run.seed}: ", None if run is group[0] else group[0])

    try:
        loaded = [threading.Event() for _ in planned]
        each = zip(planned, places, loaded, strict=True)
        trainings = [pool.submit(train, run, config, place, event) for (run, config), place, event in each]
        for (run, _), place, training, event in zip(planned, places, trainings, loaded, strict=True):
            if apart is None:
                training.result()
                score(run, place)
            event.wait()
        runs = [run for run, _ in planned]
        # The last rows are still scored, each by one job: the others need not wait for them.
        floors = untrained(runs, what) if what.floors else []
        groups = alike(floors)
        if apart is None:
            list(map(score_alike, groups))
        else:
            for scoring in [*trainings, *(pool.submit(score_alike, group) for group in groups)]:
                scoring.result()
    finally:  # after Ctrl-C, what has not begun must not begin, and what has must end
        pool.shutdown(wait=False, cancel_futures=True)
        processes.end()
        pool.shutdown()
    return runs + floors


def _load(run: Run) -> None:
    """Read what a run says of itself; of one that failed, what it had logged until then is a result, too."""
    if run.error is not None:
        with contextlib.suppress(ValueError, OSError):
            load_logged(run)
        return
    try:
        load_run(run)
    except (ValueError, OSError) as error:
        run.error = in_words(error)


def _segment(run: Run, config: Path, place: str, say: Say, processes: Processes) -> None:
    try:
        run.results |= segment(run, config, processes.run, lambda line: say(f"{place}{line}"))
    except (ValueError, OSError) as error:
        run.error = in_words(error)
        return
    say(place + "  ".join(f"{column} {run.results[column]['mIoU']:.1f}" for column in MODES))


def _train(run: Run, arguments: list[str], place: str, say: Say, processes: Processes) -> None:
    if (run.folder / SUMMARY).is_file():
        say(f"{place}trained already")
        return
    say(f"{place}training")
    write_json(*request_of(run, arguments))
    log = run.folder.parent / f"{run.folder.name}.log"
    # A process of its own: its peak memory and time are its own, and its end is not that of the comparison.
    # A module and not -c, so that Lightning can start it again for each further device.
    command = [sys.executable, "-m", "nepa_plugin.comparison.child", *arguments]
    command += ["--run_dir", str(run.folder), "--ckpt_path", "auto"]
    status = processes.run(command, log)
    if status or not (run.folder / SUMMARY).is_file():
        run.error = f"training ended with status {status}: {last_line(log)} (see {log})"


def _evaluate(
    run: Run, what: Comparison, place: str, say: Say, processes: Processes | None = None, twin: Run | None = None
) -> None:
    """Evaluate a run as asked, in a process of its own where one can be started.

    A twin, evaluated before, is the same network but for its attention, which fine-tuning sets: it is not tuned twice.
    """
    options = what.options_of(run.name)
    tuned_alike = options.finetune.attention is not None and twin is not None and options == what.options_of(twin.name)
    shared = {name: twin.results[name] for name in TUNED if name in twin.results} if twin and tuned_alike else {}
    protocols = [name for name in what.protocols if name not in shared]
    try:
        done = _results(run, what, options, protocols, "evaluation", place, say, processes) | shared
        if what.causal and "finetune" in what.protocols and _is_predictor(run) and CAUSAL not in shared:
            tuned = replace(options, finetune=replace(options.finetune, attention="causal"))
            to = "evaluation-causal", f"{place}causal: ", say, processes
            found = _results(run, what, tuned, ["finetune"], *to)
            done = done | {CAUSAL: found["finetune"]}
        if what.attention:
            run.attention = look_at_attention(run, what.data, options.crop_pct)
    except Exception as error:  # whatever it is, the other rows go on
        with (run.folder / LOG).open("a") as log:
            traceback.print_exc(file=log)
        run.error = f"evaluation: {error} (see {run.folder / LOG})"
        return
    run.results = {name: done[name] for name in [*what.protocols, CAUSAL] if name in done}
    scores = [f"{name} {result['top1']:.1f}" for name, result in run.results.items() if "top1" in result]
    say(f"{place}{'  '.join(scores)}" + (f"  (fine-tuned once for this and {twin.name})" if shared and twin else ""))


def _tuned_first(group: list[Run], what: Comparison) -> list[Run]:
    """Return runs of one network, those first that an earlier comparison has fine-tuned: the others share it."""

    def is_new(run: Run) -> bool:
        try:
            return "finetune" not in _done(run.folder / "evaluation", what.options_of(run.name), what)
        except (ValueError, OSError):  # which its own evaluation says
            return True

    return sorted(group, key=is_new) if len(group) > 1 and "finetune" in what.protocols else group


def _is_predictor(run: Run) -> bool:
    config = read_json(run.folder / "backbone" / "config.json", {"architecture": str}, f"Remove {run.folder}.")
    return str(config["architecture"]).startswith("nepa_vit_")


def _results(
    run: Run,
    what: Comparison,
    options: EvaluationOptions,
    protocols: Sequence[str],
    folder: str,
    place: str,
    say: Say,
    processes: Processes | None,
) -> dict[str, Any]:
    """Return the results of protocols, of which those that there are not yet are made, in a folder of the run."""
    out = run.folder / folder
    done = _done(out, options, what)
    missing = [name for name in protocols if name not in done]
    if not missing:
        return done
    say(f"{place}evaluating {', '.join(missing)}")
    write_json(out / REQUEST, request_for(what.data, options))
    if processes is None:
        return done | evaluate(run.folder / "backbone", what.data, missing, options, out)["protocols"]
    command = [sys.executable, "-m", "nepa_plugin.comparison.evaluating", str(out), *missing]
    if status := processes.run(command, run.folder / LOG):
        said = last_line(run.folder / LOG)
        raise ComparisonError(said if status == 1 else f"ended with status {status}: {said}")
    return _done(out, options, what)


def _done(out: Path, options: EvaluationOptions, what: Comparison) -> dict[str, Any]:
    """Return the results that there are by these options, on the images that there are now; put others aside."""
    results = read_results(out)
    if results is None:
        return {}
    train, val = evaluation_images(what.data, what.options.max_image_pixels)
    now = {"train": content_fingerprint(train), "val": content_fingerprint(val)}
    same_images = results["data"].get("images_sha256", now) == now
    if same_images and (out / REQUEST).is_file() and read_request(out / REQUEST) == (what.data, options):
        return dict(results["protocols"])
    if not same_images:
        put_aside(out)
    return {}
