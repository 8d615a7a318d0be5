"""Evaluate a backbone with one or several protocols; prints tables and extends DIR/results.json.

nepa evaluate runs/x/backbone --data digits --protocol knn,linear,readout --out runs/x
nepa evaluate runs/x/backbone --data /data/images --protocol linear --linear.solver sgd --devices 8
nepa evaluate vit_small_patch16_224 --untrained true --data /data/images --protocol knn

BACKBONE is a timm folder, a published NEPA folder, a hub id, a .ckpt of a pretraining run, or a timm model name. The
image folder holds train/ and val/, a sub-folder per class. With --devices N, or under torchrun, N processes share the
work. --recipe vit_digits fine-tunes as that config of nepa finetune says; --finetune.lr and the like change it.
"""

import os
import sys
from itertools import pairwise
from typing import Optional

from rich.console import Console

from nepa_plugin.commands.boundary import errors_in_one_line
from nepa_plugin.commands.evaluation_options import Parser, add_options, options_of, split_recipe
from nepa_plugin.commands.naming import program
from nepa_plugin.evaluation import evaluate, tables
from nepa_plugin.runtime.reading import read_yaml_text


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: Command line arguments; ``sys.argv`` by default.

    Raises:
        SystemExit: With status 2 and one line on stderr if the input is bad.
    """
    parser = Parser(prog=program("evaluate", args), description=__doc__, default_env=False)
    parser.add_argument("backbone", type=str, help="what to evaluate")
    parser.add_argument("--data", type=str, required=True, help="'digits', or a folder with train/ and val/")
    parser.add_argument("--protocol", type=str, default="readout", help="knn,linear,attentive,finetune,readout,head")
    parser.add_argument("--out", type=Optional[str], default=None, help="folder for results.json and readout.png")
    parser.add_argument("--no-cache", action="store_true", help="compute features anew and keep none")
    parser.add_argument("--config", action="config", help="YAML file of options")
    parser.add_argument("--recipe", type=str, help="fine-tune as this config of nepa finetune says, such as vit_digits")
    add_options(parser)
    with errors_in_one_line():
        arguments = sys.argv[1:] if args is None else args
        for path in _configs(arguments):
            read_yaml_text(path)  # which jsonargparse reads without bounds
        recipe, others = split_recipe(arguments)
        given = parser.parse_args(recipe + others)
        names = ("backbone", "data", "protocol", "out", "no_cache", "config", "recipe")
        options = options_of(parser, given, names, cache=not given.no_cache)
        options.progress = options.progress or sys.stderr.isatty()
        protocols = [name.strip() for name in given.protocol.split(",") if name.strip()]
        results = evaluate(given.backbone, given.data, protocols, options, given.out)
        for table in tables(results) if results else ():
            Console(width=120).print(table)


def _configs(args: list[str]) -> list[str]:
    """Return the files that are given as ``--config``, of those that are there."""
    found = [after for option, after in pairwise(args) if option == "--config"]
    found += [arg.removeprefix("--config=") for arg in args if arg.startswith("--config=")]
    return [path for path in found if os.path.lexists(path)]
