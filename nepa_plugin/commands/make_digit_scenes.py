"""Write the embedded segmentation demo: scenes of handwritten digits with a class per pixel, in ADE20K's layout.

nepa digit-scenes data/digit_scenes
"""

from nepa_plugin.commands.boundary import errors_in_one_line
from nepa_plugin.commands.naming import command_parser
from nepa_plugin.runtime.places import check_folder
from nepa_plugin.runtime.ranges import NonNegativeInt, PositiveInt, check_hints
from nepa_plugin.segmentation.scenes import digit_scenes


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: Command line arguments; ``sys.argv`` by default.

    Raises:
        SystemExit: With status 2 and one line on stderr if the input is bad.
    """
    parser = command_parser("digit-scenes", __doc__, args)
    parser.add_argument(
        "folder", help="folder to create: images/ and annotations/, each with training/ and validation/"
    )
    parser.add_argument("--training", type=int, default=600, help="number of training scenes")
    parser.add_argument("--validation", type=int, default=100, help="number of validation scenes")
    parser.add_argument("--seed", type=int, default=0, help="of the composition")
    given = parser.parse_args(args)
    with errors_in_one_line():
        hints = {"--training": PositiveInt, "--validation": PositiveInt, "--seed": NonNegativeInt}
        check_hints(hints, {f"--{name}": value for name, value in vars(given).items()})
        check_folder(given.folder, "the folder")
        print(f"Wrote {digit_scenes(given.folder, given.training, given.validation, seed=given.seed)}")
