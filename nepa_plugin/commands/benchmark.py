"""Time NEPA's training step beside others, on this machine; prints a table and writes JSON.

nepa benchmark --model base --batch-size 256 --precision bf16-mixed --compile off on
nepa benchmark --model small --batch-size 64 --compare mae dino simclr aim timm
nepa benchmark --model base --batch-size 128 --data /data/imagenet/train --pipeline pil tensor --devices 8

Several values of an option are all tried, in turns: --rounds times each. With --data random one batch stays on the
device; a folder is read by the loader of nepa pretrain. `timm` is timm's own Eva of the same size in a bare PyTorch
loop: no Lightning, no moving average, no probe.
"""

import sys

from pytorch_lightning.utilities.rank_zero import rank_zero_only
from rich.console import Console

from nepa_plugin.commands.boundary import errors_in_one_line
from nepa_plugin.commands.naming import command_line, command_parser
from nepa_plugin.runtime.files import write_json
from nepa_plugin.runtime.places import check_file
from nepa_plugin.speed import Options, benchmark, cases, kernel_table, profile_step, table
from nepa_plugin.speed.cases import NAMES, PLAIN


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: Command line arguments; ``sys.argv`` by default.

    Raises:
        SystemExit: With status 2 and one line on stderr if the input is bad.
    """
    parser = command_parser("benchmark", __doc__, args)
    parser.add_argument("--model", nargs="+", default=["base"], help="tiny, small, base, large, huge")
    parser.add_argument("--img-size", nargs="+", type=int, default=[224])
    parser.add_argument("--patch-size", nargs="+", type=int, default=[14])
    parser.add_argument("--batch-size", nargs="+", type=int, default=[64], help="images per device")
    parser.add_argument("--precision", nargs="+", default=["bf16-mixed"], help="32-true, bf16-mixed, 16-mixed")
    parser.add_argument("--compile", nargs="*", choices=["off", "on"], default=["off"])
    parser.add_argument("--attention", nargs="+", choices=["causal", "bidirectional"], default=["causal"])
    parser.add_argument("--depth", nargs="+", type=int, default=[None], help="blocks; the model's own by default")
    parser.add_argument("--grad-checkpointing", nargs="*", choices=["off", "on"], default=["off"])
    parser.add_argument("--compare", nargs="+", default=[], help=f"others beside NEPA: {', '.join([*NAMES, *PLAIN])}")
    parser.add_argument("--data", default="random", help="'random', or a folder of images")
    parser.add_argument("--pipeline", nargs="+", choices=["pil", "tensor", "device"], default=["pil"])
    parser.add_argument("--num-workers", type=int, default=None)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20, help="timed in each round")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="instead: where the first case's time goes, by kernel")
    parser.add_argument("--out", default=None, help="JSON file")
    given = parser.parse_args(args)
    with errors_in_one_line():
        if given.out:
            check_file(given.out)
        chosen = cases(
            given.compare,
            model=given.model,
            img_size=given.img_size,
            patch_size=given.patch_size,
            batch_size=given.batch_size,
            precision=given.precision,
            compiled=[value == "on" for value in given.compile or ["on"]],
            attention=given.attention,
            depth=given.depth,
            grad_checkpointing=[value == "on" for value in given.grad_checkpointing or ["on"]],
            pipeline=given.pipeline,
        )
        names = ("steps", "warmup", "rounds", "accelerator", "devices", "data", "num_workers")
        options = Options(**{name: getattr(given, name) for name in names})
        if given.profile:
            kernels = profile_step(chosen[0], options)
            if given.out:
                write_json(
                    given.out, {"command": command_line("benchmark", args), "kernels": [vars(k) for k in kernels]}
                )
            Console(width=140).print(kernel_table(kernels, chosen[0].label))
            return
        results = benchmark(chosen, options, _report)
        if getattr(rank_zero_only, "rank", 0):
            return
        Console(width=200 if not sys.stdout.isatty() else None).print(table(results))  # also if it cannot be written
        if given.out:
            write_json(given.out, {"command": command_line("benchmark", args), **results})


@rank_zero_only
def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
