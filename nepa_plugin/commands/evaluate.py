"""Evaluate a backbone with one or several protocols; prints tables and extends DIR/results.json.

nepa evaluate runs/x/backbone --data digits --protocol knn,linear,readout --out runs/x
nepa evaluate runs/x/backbone --data /data/images --protocol linear --linear.solver sgd --devices 8
nepa evaluate vit_small_patch16_224 --untrained true --data /data/images --protocol knn

BACKBONE is a timm folder, a published NEPA folder, a hub id, a .ckpt of a pretraining run, or a timm model name. The
image folder holds train/ and val/, a sub-folder per class. With --devices N, or under torchrun, N processes share the
work. Small images that must not be mirrored or mixed, such as digits, are fine-tuned with
--finetune.hflip_prob 0 --finetune.mixup 0 --finetune.cutmix 0 --finetune.auto_augment '' --finetune.random_erasing 0.
"""

import sys
from typing import NoReturn, Optional

from jsonargparse import ArgumentParser
from rich.console import Console

from nepa_plugin.commands.naming import program
from nepa_plugin.evaluation import EvaluationOptions, evaluate, tables


class Parser(ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sys.exit(f"error: {' '.join(message.split())} (--help lists the options)")


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: Command line arguments; ``sys.argv`` by default.

    Raises:
        SystemExit: With one line on stderr if the input is bad.
    """
    parser = Parser(prog=program("evaluate", args), description=__doc__, default_env=False)
    parser.add_argument("backbone", type=str, help="what to evaluate")
    parser.add_argument("--data", type=str, required=True, help="'digits', or a folder with train/ and val/")
    parser.add_argument("--protocol", type=str, default="readout", help="knn,linear,attentive,finetune,readout")
    parser.add_argument("--out", type=Optional[str], default=None, help="folder for results.json and readout.png")
    parser.add_argument("--no-cache", action="store_true", help="compute features anew and keep none")
    parser.add_argument("--config", action="config", help="YAML file of options")
    parser.add_class_arguments(EvaluationOptions, skip={"cache"})
    given = parser.parse_args(args)
    chosen = parser.instantiate(given) if hasattr(parser, "instantiate") else parser.instantiate_classes(given)
    names = ("backbone", "data", "protocol", "out", "no_cache", "config")
    options = EvaluationOptions(**{k: v for k, v in vars(chosen).items() if k not in names}, cache=not given.no_cache)
    options.progress = options.progress or sys.stderr.isatty()
    protocols = [name.strip() for name in given.protocol.split(",") if name.strip()]
    try:
        results = evaluate(given.backbone, given.data, protocols, options, given.out)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    for table in tables(results) if results else ():
        Console(width=120).print(table)
