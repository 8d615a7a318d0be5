"""SIGTERM where the processes cannot agree; where they can, ``test_scaling.py`` has it."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from pytorch_lightning.utilities.exceptions import SIGTERMException
from recording import ROOT, arguments

from nepa_plugin.training.stopping import StopTogether

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
    # the later of the two may see the earlier one gone before its own time is over
    assert done.stderr.count("A process got SIGTERM") == 2
    assert "waits for another process since" in done.stderr
    assert "Go on from the last one: --ckpt_path last." in done.stderr


LOST = RuntimeError("[pair.cc:561] Connection closed by peer [127.0.0.1]:13197")


@pytest.mark.parametrize(
    ("signalled", "processes", "error", "status"),
    [
        (True, 2, LOST, 143),
        (True, 2, dist.DistNetworkError("the store is gone"), 143),
        (False, 2, LOST, 0),  # nobody asked it to end: the error is told
        (True, 1, LOST, 0),
        (True, 2, RuntimeError("shapes do not match"), 0),
        (True, 2, SIGTERMException(), 0),
    ],
)
def test_a_peer_that_ended_first_is_no_error(signalled, processes, error, status):
    """After SIGTERM, the collective of a process whose peer's deadline passed a moment earlier fails."""
    child = os.fork()
    if child == 0:
        try:
            stop = StopTogether()
            stop._signalled = signalled
            stop.on_exception(SimpleNamespace(world_size=processes), None, error)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
