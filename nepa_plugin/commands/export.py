"""Write a backbone or a classifier for use without this package: as ONNX, or as a torch.export program.

nepa export runs/mine/finetuned classifier.onnx
nepa export runs/mine/backbone backbone.pt2 --batch 8 --attention bidirectional
"""

from pathlib import Path
from typing import Any

from nepa_plugin.checkpoints import load_backbone
from nepa_plugin.checkpoints.export import check_exportable, export_model
from nepa_plugin.commands.boundary import errors_in_one_line
from nepa_plugin.commands.naming import command_parser
from nepa_plugin.runtime.places import check_file


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: Command line arguments; ``sys.argv`` by default.

    Raises:
        SystemExit: With status 2 and one line on stderr if the input is bad.
    """
    parser = command_parser("export", __doc__, args)
    parser.add_argument("source", help="whatever load_backbone reads: a folder, a hub id, a .ckpt, a .pth")
    parser.add_argument("target", type=Path, help="the .onnx or .pt2 file to write")
    parser.add_argument("--batch", type=int, help="images per call; any number by default")
    parser.add_argument("--img_size", type=int, help="image size in pixels; the checkpoint's by default")
    parser.add_argument("--attention", choices=["causal", "bidirectional"], help="of a NEPA predictor")
    parser.add_argument("--weights", choices=["average", "raw"], default="average", help="of a published run folder")
    given = parser.parse_args(args)
    with errors_in_one_line():
        check_exportable(given.target, given.batch)
        check_file(given.target)
        chosen: dict[str, Any] = {"img_size": given.img_size, "attention": given.attention}
        overrides = {name: value for name, value in chosen.items() if value is not None}
        model: Any = load_backbone(given.source, given.weights, **overrides)
        difference = export_model(model, given.target, given.batch)
        height, width = model.patch_embed.img_size
        what = f"logits of {model.num_classes} classes" if getattr(model, "num_classes", 0) else "tokens"
        print(
            f"Wrote {given.target}: images ({given.batch or 'any number'}, {model.patch_embed.proj.in_channels}, "
            f"{height}, {width}) -> {what}, within {difference:.1g} of PyTorch."
        )
