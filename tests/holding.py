"""A process that holds the lock of a folder."""

import contextlib
import subprocess
import sys

HOLD = """
import sys, time
from nepa_plugin.runtime.locks import lock_folder
lock = lock_folder(sys.argv[1], "--out")
print("locked", flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def held(folder):
    """Let another process hold a folder; give its number."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"locked\n"
            yield process.pid
        finally:
            process.kill()
