"""Run several pretraining commands (ARGUMENTS -- ARGUMENTS ...), one after the other, in a torchrun process.

``copy FOLDER TO`` in place of arguments, after the first, copies a run for the next command to go on with.
"""

import os
import shutil
import sys
from itertools import groupby
from pathlib import Path

import torch.distributed as dist

from nepa_plugin.training.cli import main

if __name__ == "__main__":
    os.environ["MASTER_PORT"] = os.environ["TEST_PORT"]  # not the one that torchrun found free some seconds ago
    base = Path(__file__).parents[2] / "lightly_configs" / "base.yaml"
    for separator, arguments in groupby(sys.argv[1:], lambda argument: argument == "--"):
        if separator:
            continue
        command = list(arguments)
        if command[0] == "copy":
            if dist.get_rank() == 0:
                shutil.copytree(*command[1:])
            dist.barrier()
            continue
        try:
            main(command, base)
        except SystemExit as stopped:
            if stopped.code != 143:  # by SIGTERM; the next command may go on with it
                raise
