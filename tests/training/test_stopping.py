"""SIGTERM where the processes cannot agree; where they can, ``test_scaling.py`` has it."""

import os
import subprocess
import sys
import time

import pytest
from recording import ROOT, arguments

COMMAND = [sys.executable, str(ROOT / "tools" / "pretrain.py")]
HANGS = "--trainer.callbacks", '[{"class_path": "recording.Hangs"}]'


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_process_that_waits_for_one_that_hangs_ends(strategy, tmp_path):
    """Rank 0 waits in a collective, in C++, for rank 1, which sleeps; without the deadline both would for ever."""
    more = "--trainer.devices", "2", "--data.batch_size_per_device", "64", "--trainer.strategy", strategy
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]), OMP_NUM_THREADS="1")
    start = time.monotonic()
    done = subprocess.run(  # returns when neither holds its end of the pipe any more
        [*COMMAND, *arguments(tmp_path / "r", *more, *HANGS)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 143, done.stderr[-2000:]
    assert time.monotonic() - start < 200
    assert done.stderr.count("A process got SIGTERM and waits for another process since") == 2
    assert "Go on from the last one: --ckpt_path last." in done.stderr
