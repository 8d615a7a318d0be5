"""`nepa demo`: its steps, its last lines, and what it does when a step fails or it is stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nepa_command
from nepa_plugin.commands import demo


@pytest.fixture
def commands(monkeypatch):
    """The steps of the demo, which are not run."""
    seen = []
    monkeypatch.setattr(demo, "_run", seen.append)
    return seen


@pytest.mark.parametrize("argv0", ["tools/demo.py", "nepa"])
def test_steps_and_last_lines(argv0, commands, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / argv0), "demo"])
    nepa = [str(tmp_path / "nepa")] if argv0 == "nepa" else [sys.executable, "-m", "nepa_command"]
    demo.main(["--run_dir", "a b"])
    assert [step[: len(nepa)] for step in commands] == [nepa] * 3
    pretrain, evaluate, visualize = (step[len(nepa) :] for step in commands)
    assert pretrain == ["pretrain", "--config", "nepa_demo", "--run_dir", "a b", "--ckpt_path", "auto"]
    assert evaluate[:6] == ["evaluate", "a b/backbone", "--data", "digits", "--protocol", "readout"]
    assert evaluate[6:] == ["--floor", "true", "--out", "a b"]
    assert visualize == ["visualize", "a b/backbone", "--data", "digits", "--out", "a b/similarity.png"]
    assert {step[0] for step in (pretrain, evaluate, visualize)} < set(nepa_command.COMMANDS)
    printed = capsys.readouterr().out
    assert "The loss:      a b/loss.png\n" in printed and "All curves:    " in printed
    assert printed.endswith("pretrain --config nepa_vit_b --data.train_dir YOUR_IMAGES\n")


def test_make_demo_calls_it():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert "demo: setup\n\t@$(BIN)/nepa demo --run_dir $(RUN)\n" in makefile


def test_a_folder_that_cannot_be_written_to_is_one_line(commands, capsys, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as status:
        demo.main(["--run_dir", str(tmp_path / "file")])
    assert status.value.code == 2 and commands == []
    assert capsys.readouterr().err == f"error: --run_dir {tmp_path / 'file'}: it is no folder.\n"


def test_a_step_that_fails_ends_it_with_its_status(capfd):
    demo._run([sys.executable, "-c", "print('done')"])
    assert capfd.readouterr().out == f"{sys.executable} -c 'print('\"'\"'done'\"'\"')'\ndone\n"
    with pytest.raises(SystemExit) as status:
        demo._run([sys.executable, "-c", "import sys; sys.exit(3)"])
    assert status.value.code == 3


def test_stopped_it_stops_its_step_and_ends_with_its_status(tmp_path):
    step = f"""
import signal, sys, time, pathlib
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
pathlib.Path({str(tmp_path / "started")!r}).touch()
time.sleep(60)
"""
    code = f"import sys; from nepa_plugin.commands.demo import _run; _run([sys.executable, '-c', {step!r}])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) as process:
        end = time.monotonic() + 120
        while not (tmp_path / "started").exists() and time.monotonic() < end:
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(30) == 143
