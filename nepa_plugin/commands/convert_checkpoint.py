"""Convert a checkpoint between the timm folder and the published NEPA layout.

nepa convert someone/nepa-checkpoint out/ --layout timm
nepa convert runs/x/checkpoints/last.ckpt out/ --layout nepa
"""

from nepa_plugin.checkpoints import load_backbone, save_backbone
from nepa_plugin.commands.boundary import errors_in_one_line
from nepa_plugin.commands.naming import command_parser
from nepa_plugin.runtime.places import check_folder


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: Command line arguments; ``sys.argv`` by default.

    Raises:
        SystemExit: With status 2 and one line on stderr if the input is bad.
    """
    parser = command_parser("convert", __doc__, args)
    parser.add_argument("source", help="timm folder, published NEPA folder, hub id, or .ckpt of a pretraining run")
    parser.add_argument("folder", help="where to write config.json and model.safetensors")
    parser.add_argument("--layout", choices=["timm", "nepa"], default="timm")
    given = parser.parse_args(args)
    with errors_in_one_line():
        check_folder(given.folder, "the folder")
        print(f"Wrote {save_backbone(load_backbone(given.source), given.folder, layout=given.layout)}")
