"""Train several methods on equal terms, evaluate them the same way, and write a report.

nepa compare nepa_digits mae_digits --data digits --seeds 0 1
nepa compare dino_cifar10 mae_cifar10 --data /data/cifar10 -- --trainer.max_epochs 100
nepa compare runs/a runs/b --data /data/images            # finished runs; the folder holds train/ and val/

What follows `--` goes to `nepa pretrain` for every config. A comparison that was stopped goes on where it was.

Every option of `nepa evaluate` is one here, for all rows alike: --k 10, --finetune.epochs 30, --recipe vit_digits.
One row alone has other options with --row, as in --row mae_digits:finetune.lr=4e-3. With --evaluate finetune, the
untrained rows are the same networks from scratch.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from nepa_plugin.commands.boundary import errors_in_one_line
from nepa_plugin.commands.evaluation_options import Parser, add_options, options_of, split_recipe
from nepa_plugin.commands.naming import command_line, command_parser, say_usage_error
from nepa_plugin.comparison import Comparison, compare
from nepa_plugin.comparison.report import accuracy_table, failures, write_report
from nepa_plugin.comparison.report.searched import search_table
from nepa_plugin.comparison.search import search


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


def _rows(given: list[str]) -> dict[str, list[str]]:
    """Return the options of each row that has some of its own."""
    rows: dict[str, list[str]] = {}
    for text in given:
        name, colon, option = text.partition(":")
        if not colon or "=" not in option or not name:
            say_usage_error(f"--row {text}: write it as NAME:OPTION=VALUE, such as mae_digits:finetune.lr=4e-3.")
        rows.setdefault(name, []).append(f"--{option}")
    return rows


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
    row = "an option of one row alone"
    parser.add_argument("--row", action="append", default=[], metavar="NAME:OPTION=VALUE", help=row)
    config = (
        "segment with every backbone, too, frozen and fine-tuned: a config of mmsegmentation, such as nepa_vit_b_camvid"
    )
    parser.add_argument("--segment", metavar="CONFIG", help=config)
    trials = "trials per config, of its learning rate and one more option, on held-out training images; none by default"
    parser.add_argument("--search", type=int, default=0, metavar="TRIALS", help=trials)
    parser.add_argument("--no_untrained", action="store_true", help="leave out the rows with fresh weights")
    causal = "fine-tune NEPA's rows with causal attention, too"
    parser.add_argument("--causal", action="store_true", help=causal)
    looked = "look at the backbones' attention, too: distance, entropy and locality by layer"
    parser.add_argument("--attention", action="store_true", help=looked)
    parser.add_argument("--search_seed", type=int, default=0, help="of the trials' choices and trainings")
    part = "part of the epochs, of pretraining and of fine-tuning, that a trial has; all by default"
    parser.add_argument("--search_length", type=float, default=1.0, metavar="PART", help=part)
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs trained and scored at the same time, on the CPU or one GPU"
    )
    evaluation = Parser(add_help=False)
    add_options(evaluation)
    with errors_in_one_line():
        recipe, typed = split_recipe(arguments[:split])
        given, others = parser.parse_known_args(typed)
        others = recipe + others
        options = options_of(evaluation, evaluation.parse_args(others))
        rows = {name: evaluation.parse_args([*others, *own]) for name, own in _rows(given.row).items()}
        own_options = {name: options_of(evaluation, row) for name, row in rows.items()}
        protocols = [name.strip() for name in given.evaluate.split(",") if name.strip()]
        what = Comparison(
            given.sources,
            given.out,
            given.data,
            protocols,
            given.seeds,
            overrides,
            options,
            given.jobs,
            own_options,
            segmentation=given.segment,
            causal=given.causal,
            attention=given.attention,
            floors=not given.no_untrained,
        )
        if given.causal and "finetune" not in protocols:
            raise ValueError("--causal goes with --evaluate finetune.")
        if given.search_length != 1 and not given.search:
            raise ValueError("--search_length goes with --search.")
        tables = []
        with _ended_by_signals():
            if given.search:
                what, found = search(what, given.search, given.search_seed, given.search_length)
                tables.append(search_table(found))
            runs = compare(what)
        write_report(runs, given.out, command_line("compare", args), given.title, tables)
        console = Console(width=140, markup=False)
        console.print(accuracy_table(runs).as_rich())
        console.print(f"Report: {given.out / 'report.html'}, {given.out / 'report.md'}, {given.out / 'results.csv'}")
    if failures(runs):
        sys.stderr.write("error: " + "\n".join(failures(runs)) + "\n")
        sys.exit(1)
