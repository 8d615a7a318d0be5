"""Train several methods on equal terms, evaluate them the same way, and write a report.

python tools/compare.py lightly_configs/nepa_digits.yaml lightly_configs/mae_digits.yaml --data digits --seeds 0 1
python tools/compare.py lightly_configs/*_cifar10.yaml --data /data/cifar10 -- --trainer.max_epochs 100
python tools/compare.py runs/a runs/b --data /data/images            # finished runs; the folder holds train/ and val/

What follows `--` goes to tools/pretrain.py for every config. A comparison that was stopped goes on where it was.
"""

import argparse
import shlex
import sys
from pathlib import Path

from rich.console import Console

from nepa_plugin.comparison import Comparison, ComparisonError, compare
from nepa_plugin.comparison.report import accuracy_table, failures, write_report
from nepa_plugin.evaluation import EvaluationOptions


def main() -> None:
    given, overrides = sys.argv[1:], []
    if "--" in given:
        given, overrides = given[: given.index("--")], given[given.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="CONFIG", help="config file, or folder of a finished run")
    parser.add_argument("--data", required=True, help="'digits', or a folder with train/ and val/")
    parser.add_argument("--evaluate", default="knn,linear,attentive,readout", help="protocols, separated by commas")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337], help="seeds that each config is trained with")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder for runs and report")
    parser.add_argument("--title", default="Comparison of self-supervised methods")
    parser.add_argument("--k", type=int, default=20, help="neighbours of kNN")
    parser.add_argument("--jobs", type=int, default=1, help="runs trained at the same time, on the CPU or one GPU")
    args = parser.parse_args(given)
    options = EvaluationOptions(k=args.k)
    protocols = args.evaluate.split(",")
    what = Comparison(args.sources, args.out, args.data, protocols, args.seeds, overrides, options, args.jobs)
    try:
        runs = compare(what)
    except (ComparisonError, ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    write_report(runs, args.out, shlex.join(["python", *sys.argv]), args.title)
    console = Console(width=140)
    table = accuracy_table(runs)
    console.print(table.as_rich())
    console.print(f"Report: {args.out / 'report.html'}, {args.out / 'report.md'}, {args.out / 'results.csv'}")
    if failures(runs):
        sys.exit("error: " + "\n".join(failures(runs)))


if __name__ == "__main__":
    main()
