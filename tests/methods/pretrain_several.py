"""Run several pretraining commands (ARGUMENTS -- ARGUMENTS ...), one after the other, in a torchrun process."""

import sys
from itertools import groupby
from pathlib import Path

from nepa_plugin.training.cli import main

if __name__ == "__main__":
    base = Path(__file__).parents[2] / "lightly_configs" / "base.yaml"
    for separator, arguments in groupby(sys.argv[1:], lambda argument: argument == "--"):
        if not separator:
            try:
                main(list(arguments), base)
            except SystemExit as stopped:
                if stopped.code != 143:  # by SIGTERM; the next command may go on with it
                    raise
