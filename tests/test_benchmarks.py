"""The script for the first GPU, at toy size, whose failures leave the other parts; and the one of two hosts."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_all_parts_run_at_toy_size(tmp_path):
    pytest.importorskip("mmseg")
    command = [sys.executable, str(SCRIPT), "--toy", "--out", str(tmp_path)]
    environment = dict(os.environ, PYTHONPATH=str(SCRIPT.parents[1]))
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "gpu.json").read_text())
    names = [
        "peak",
        "parity",
        "waits",
        "strategies",
        "every_method",
        "finetuning",
        "pipelines",
        "steps",
        "segmentation",
        "kernels",
        "memory",
    ]
    assert list(results["parts"]) == names and not any("failed" in found for found in results["parts"].values())
    assert results["parts"]["parity"]["causal, float32"] < 1e-5
    assert results["parts"]["waits"]["ibot"] == "none"
    assert float(results["parts"]["strategies"]["fsdp"].removeprefix("largest difference ")) < 1e-5
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"## {name}" in page for name in names)


def test_one_failure_leaves_the_others(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def dies(place):
        """Dies."""
        os._exit(3)

    def raises(place):
        """Raises."""
        raise ValueError("no such\nkernel")

    def hangs(place):
        """Hangs."""
        import time

        time.sleep(60)

    def works(place):
        """Works."""
        return {"answer": 42}

    def never(place):
        """Comes too late."""

    monkeypatch.setattr(script, "PARTS", [dies, raises, hangs, works])
    monkeypatch.setattr(script, "PART_SECONDS", 1)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--toy", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 1
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts["dies"]["failed"] == "its process died"
    assert parts["raises"]["failed"] == "FAILED: ValueError: no such kernel"
    assert parts["hangs"]["failed"] == "ended after 1 s"
    assert parts["works"]["answer"] == 42
    assert "| answer | 42 |" in (tmp_path / "gpu.md").read_text()
    monkeypatch.setattr(script, "PARTS", [never])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--toy", "--seconds", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        script.main()
    assert "the time was over" in (tmp_path / "gpu.json").read_text()


def test_two_hosts_say_what_they_need(tmp_path):
    command = [sys.executable, str(SCRIPT.with_name("two_hosts.py")), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, PATH=str(tmp_path)))
    assert done.returncode == 77 and not (tmp_path / "out").exists()
    assert done.stdout.startswith("Skipped: two hosts on one machine need ") and "iproute2" in done.stdout
