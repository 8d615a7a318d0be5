"""Pretrain NEPA on scikit-learn's handwritten digits, and look at what it learned: no download, some minutes on a CPU.

nepa demo --run_dir runs/demo

Prints each command before it runs it. A demo that was stopped goes on where it was.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from nepa_plugin.commands.boundary import errors_in_one_line
from nepa_plugin.commands.naming import command_parser
from nepa_plugin.runtime.places import check_folder


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: Command line arguments; ``sys.argv`` by default.

    Raises:
        SystemExit: With the status of the first step that fails, or with status 2 and one line on stderr if nothing
            can be written to the folder.
    """
    parser = command_parser("demo", __doc__, args)
    parser.add_argument("--run_dir", default="runs/demo", help="folder for everything that it writes")
    run_dir = parser.parse_args(args).run_dir
    with errors_in_one_line():
        check_folder(run_dir, "--run_dir")
        _demo(run_dir)


def _demo(run_dir: str) -> None:
    """Run the steps, and say where what they made is."""
    backbone = f"{run_dir}/backbone"
    nepa = _nepa()
    for step in (
        ["pretrain", "--config", "nepa_demo", "--run_dir", run_dir, "--ckpt_path", "auto"],
        ["evaluate", backbone, "--data", "digits", "--protocol", "readout", "--floor", "true", "--out", run_dir],
        ["visualize", backbone, "--data", "digits", "--out", f"{run_dir}/similarity.png"],
    ):
        _run([*nepa, *step])
    tensorboard = shlex.join([*_beside("tensorboard"), "--logdir", run_dir])
    print(f"""
The loss:      {run_dir}/loss.png
What it sees:  {run_dir}/similarity.png
The backbone:  {backbone}    timm.create_model('local-dir:{backbone}', pretrained=True)
All curves:    {tensorboard}
Next, your own images:
  {shlex.join(nepa)} pretrain --config nepa_vit_b --data.train_dir YOUR_IMAGES""")


def _nepa() -> list[str]:
    """Return how to call ``nepa`` from here, as it was called."""
    if Path(sys.argv[0]).stem == "nepa":
        return _beside("nepa")
    return [sys.executable, "-m", "nepa_command"]


def _beside(name: str) -> list[str]:
    """Return how to call a script that lies beside this one: by its name alone, if the shell finds it so."""
    script = Path(sys.argv[0]).with_name(name)
    found = shutil.which(name)
    return [name if found and os.path.realpath(found) == os.path.realpath(script) else str(script)]


def _run(command: list[str]) -> None:
    """Print a command, run it in a process of its own, and end if it fails."""
    print(shlex.join(command), flush=True)
    with subprocess.Popen(command) as process:
        # Stopped from outside, the step saves what it has and ends, and so does the demo.
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            status = process.wait()
        except KeyboardInterrupt:  # the terminal has sent it to the step, too
            status = process.wait() or 130
        finally:
            signal.signal(signal.SIGTERM, before)
    if status:
        sys.exit(status if status > 0 else 128 - status)
