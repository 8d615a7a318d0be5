"""mmsegmentation's own scripts, each run in a process that finds the libraries loaded."""

import contextlib
import gc
import importlib
import importlib.util
import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["nepa_plugin.segmentation", "mmseg.apis", "mmengine.runner", "matplotlib.pyplot"])


def script(name):
    """``train`` or ``test``, as mim runs it."""
    package = Path(importlib.util.find_spec("mmseg").origin).parent
    return package / ".mim" / "tools" / f"{name}.py"


def _run(path, arguments, output, environment):
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    runner: Any = importlib.import_module("mmengine.runner.runner")
    runner.collect_env = dict  # it asks compilers for their versions, for a second
    config: Any = importlib.import_module("mmengine.config.config")
    config.FormatCode = lambda text, **_: (text, True)  # it breaks the config's lines where they read best, for another
    gc.freeze()  # and a dataset collects garbage among all that was loaded
    sys.argv = [str(path), *arguments]
    with (
        contextlib.redirect_stdout(open(1, "w", closefd=False)),
        contextlib.redirect_stderr(open(2, "w", closefd=False)),
    ):
        status = 0
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            status = end.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


def run(name, arguments, output, timeout=120, **environment):
    """Run a script; return its status and what it wrote, both streams."""
    process = _CONTEXT.Process(target=_run, args=(script(name), [*map(str, arguments)], output, environment))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        return None, "it hung"
    return process.exitcode, Path(output).read_text()
