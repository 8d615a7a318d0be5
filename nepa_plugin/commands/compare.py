"""Train several methods on equal terms, evaluate them the same way, and write a report.

nepa compare nepa_digits mae_digits --data digits --seeds 0 1
nepa compare dino_cifar10 mae_cifar10 --data /data/cifar10 -- --trainer.max_epochs 100
nepa compare runs/a runs/b --data /data/images            # finished runs; the folder holds train/ and val/

What follows `--` goes to `nepa pretrain` for every config. A comparison that was stopped goes on where it was.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from nepa_plugin.commands.boundary import errors_in_one_line
from nepa_plugin.commands.naming import command_line, command_parser
from nepa_plugin.comparison import Comparison, compare
from nepa_plugin.comparison.report import accuracy_table, failures, write_report
from nepa_plugin.evaluation import EvaluationOptions


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as an exit does, which ends its trainings, too."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for number in before:
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: Command line arguments; ``sys.argv`` by default.

    Raises:
        SystemExit: With status 2 and one line on stderr if the input is bad.
    """
    arguments = sys.argv[1:] if args is None else args
    split = arguments.index("--") if "--" in arguments else len(arguments)
    overrides = arguments[split + 1 :]
    parser = command_parser("compare", __doc__, args)
    parser.add_argument("sources", nargs="+", metavar="CONFIG", help="config file or name, or folder of a finished run")
    parser.add_argument("--data", required=True, help="'digits', or a folder with train/ and val/")
    parser.add_argument("--evaluate", default="knn,linear,attentive,readout", help="protocols, separated by commas")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337], help="seeds that each config is trained with")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder for runs and report")
    parser.add_argument("--title", default="Comparison of self-supervised methods")
    parser.add_argument("--k", type=int, default=20, help="neighbours of kNN")
    parser.add_argument("--jobs", type=int, default=1, help="runs trained at the same time, on the CPU or one GPU")
    given = parser.parse_args(arguments[:split])
    with errors_in_one_line():
        options = EvaluationOptions(k=given.k)
        protocols = [name.strip() for name in given.evaluate.split(",") if name.strip()]
        what = Comparison(given.sources, given.out, given.data, protocols, given.seeds, overrides, options, given.jobs)
        with _ended_by_signals():
            runs = compare(what)
        write_report(runs, given.out, command_line("compare", args), given.title)
        console = Console(width=140, markup=False)
        console.print(accuracy_table(runs).as_rich())
        console.print(f"Report: {given.out / 'report.html'}, {given.out / 'report.md'}, {given.out / 'results.csv'}")
    if failures(runs):
        sys.stderr.write("error: " + "\n".join(failures(runs)) + "\n")
        sys.exit(1)
