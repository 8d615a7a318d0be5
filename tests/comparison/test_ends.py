"""A comparison that is ended, however, leaves no training behind."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from nepa_plugin.comparison.child import PARENT, end_with_parent
from nepa_plugin.comparison.run import Processes

SLEEP = [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(600)"]


def wait_for(what, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen")


def test_a_child_of_another_process_ends_at_once(monkeypatch):
    monkeypatch.setenv(PARENT, str(os.getpid()))
    with pytest.raises(SystemExit) as status:
        end_with_parent()
    assert status.value.code == 143
    monkeypatch.delenv(PARENT)
    end_with_parent()  # not started by a comparison


def test_ending_ends_what_runs_and_starts_nothing_more(tmp_path):
    processes, statuses, log = Processes(), [], tmp_path / "log"
    thread = threading.Thread(target=lambda: statuses.append(processes.run(SLEEP, log)))
    thread.start()
    wait_for(lambda: processes._running)
    processes.end()
    thread.join(30)
    assert statuses == [-signal.SIGTERM] and processes.run(SLEEP, log) == 143


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_the_kernel_ends_a_child_whose_parent_is_killed():
    child = (
        "import time\nfrom nepa_plugin.comparison.child import end_with_parent\nend_with_parent()\n"
        "print('ready', flush=True)\ntime.sleep(600)"
    )
    parent = (
        "import os, subprocess, sys\nfrom nepa_plugin.comparison.child import PARENT\n"
        f"subprocess.run([sys.executable, '-c', {child!r}], env=os.environ | {{PARENT: str(os.getpid())}})"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        (running,) = psutil.Process(process.pid).children()
        process.kill()
        wait_for(lambda: not running.is_running(), 30)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_comparison_that_is_ended_leaves_no_training_and_goes_on_later(number, tmp_path):
    command = [sys.executable, "-m", "nepa_command", "compare", "nepa_digits", "--data", "digits", "--seeds", "0"]
    small = ["--model.backbone_args.embed_dim", "16", "--model.backbone_args.depth", "1"]
    command += ["--evaluate", "knn", "--out", str(tmp_path / "out"), "--", *small, "--trainer.max_epochs", "100000"]
    metrics = tmp_path / "out" / "nepa_digits" / "seed0" / "metrics.csv"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: metrics.is_file() and metrics.stat().st_size)
            (training,) = psutil.Process(process.pid).children()
            assert "nepa_plugin.comparison.child" in training.cmdline()
            process.send_signal(number)
            said = process.communicate(timeout=120)[1]
        finally:
            process.kill()
    expected = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert process.returncode == expected and "Traceback" not in said
    wait_for(lambda: not training.is_running(), 60)
    assert (metrics.parent / "checkpoints" / "last.ckpt").is_file()  # it has saved what it had
