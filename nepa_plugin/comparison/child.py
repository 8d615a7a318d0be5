"""A pretraining run in a process of its own, which ends when the process that started it ends.

python -m nepa_plugin.comparison.child ARGUMENTS OF nepa pretrain
"""

import ctypes
import os
import signal
import sys

#: In the environment: the process that a training belongs to.
PARENT = "NEPA_PLUGIN_PARENT"
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent ends, however it does; a training then saves what it has and ends.

    Only Linux can do this. Elsewhere a parent that is killed by SIGKILL leaves its trainings running.

    Raises:
        SystemExit: If the parent has ended already.
    """
    parent = os.environ.get(PARENT)
    if parent is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(parent):
        sys.exit(143)
    os.environ[PARENT] = str(os.getpid())  # what Lightning starts for further devices is a child of this process


def main() -> None:
    """Run the training that ``sys.argv`` asks for."""
    from nepa_plugin.training.cli import base_config
    from nepa_plugin.training.cli import main as pretrain

    pretrain(base_config=base_config())


if __name__ == "__main__":
    end_with_parent()
    main()
