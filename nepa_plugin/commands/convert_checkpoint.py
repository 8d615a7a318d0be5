"""Convert a checkpoint between a timm folder, the published NEPA layout, and an mmengine file.

nepa convert someone/nepa-checkpoint out/ --layout timm
nepa convert runs/x/checkpoints/last.ckpt out/ --layout nepa
nepa convert runs/x/backbone out.pth --layout mmengine --dry_run
"""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from nepa_plugin.checkpoints import (
    CheckpointError,
    Weights,
    load_backbone,
    open_checkpoint,
    save_backbone,
    save_mmengine,
)
from nepa_plugin.checkpoints.published import nepa_names
from nepa_plugin.commands.boundary import errors_in_one_line
from nepa_plugin.commands.naming import command_parser
from nepa_plugin.predictor import NepaViT
from nepa_plugin.runtime.places import check_file, check_folder

LAYOUTS = ("timm", "nepa", "mmengine")


def names_in(layout: str, model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the names that a model's weights have in a layout.

    Raises:
        CheckpointError: If the layout cannot hold the model.
    """
    weights = list(model.state_dict())
    if layout == "timm":
        return {name: (name,) for name in weights}
    if layout == "mmengine":
        return {name: (f"backbone.vit.{name}",) for name in weights}
    if not isinstance(model, NepaViT):
        raise CheckpointError(f"The published layout holds NEPA predictors, not {type(model).__name__}.")
    mlp = model.blocks[0].mlp
    return nepa_names(weights, len(model.blocks), mlp.fc1.out_features != mlp.fc2.in_features)


def mapping(source: str, model: nn.Module, layout: str, weights: Weights) -> Table:
    """Return a table with a row per weight: its names in the source, its shape, and its names in the target."""
    before, after = open_checkpoint(source, weights).names, names_in(layout, model)
    table = Table("in the source", "shape", f"as {layout}")
    for name, value in model.state_dict().items():
        one, other = ("\n".join(map(escape, names[name])) for names in (before, after))
        table.add_row(one, " x ".join(map(str, value.shape)) or "a number", other)
    return table


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: Command line arguments; ``sys.argv`` by default.

    Raises:
        SystemExit: With status 2 and one line on stderr if the input is bad.
    """
    parser = command_parser("convert", __doc__, args)
    parser.add_argument("source", help="whatever load_backbone reads: a folder, a hub id, a .ckpt, a .pth")
    parser.add_argument("target", help="the folder to write to, or the .pth for --layout mmengine")
    parser.add_argument("--layout", choices=LAYOUTS, default="timm")
    parser.add_argument("--weights", choices=["average", "raw"], default="average", help="of a published run folder")
    parser.add_argument("--dry_run", action="store_true", help="only show which weight would be called what")
    given = parser.parse_args(args)
    with errors_in_one_line():
        check_file(given.target) if given.layout == "mmengine" else check_folder(given.target, "the folder")
        model = load_backbone(given.source, given.weights)
        names_in(given.layout, model)
        if given.dry_run:
            Console(width=None if Console().is_terminal else 200).print(
                mapping(given.source, model, given.layout, given.weights)
            )
            print(f"Nothing was written to {given.target}.")
        elif given.layout == "mmengine":
            print(f"Wrote {save_mmengine(model, Path(given.target))}")
        else:
            print(f"Wrote {save_backbone(model, given.target, layout=given.layout)}")
