"""List the configs that come with the package, or print the path of one.

nepa configs
nepa pretrain --config nepa_vit_b --data.train_dir YOUR_IMAGES          # by name
mim train mmsegmentation $(nepa configs nepa_vit_b_ade20k)              # by path
"""

import sys

from nepa_plugin.commands.naming import command_parser
from nepa_plugin.runtime.shipped import FOLDERS, ShippedConfigError, configs, named, summary

_PRETRAIN = "nepa pretrain, nepa compare"
USED_BY = dict(
    zip(FOLDERS, (_PRETRAIN, _PRETRAIN, _PRETRAIN, "nepa finetune", "mim train mmsegmentation"), strict=True)
)


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: Command line arguments; ``sys.argv`` by default.

    Raises:
        SystemExit: With one line on stderr if no config has the given name.
    """
    parser = command_parser("configs", __doc__, args)
    parser.add_argument("name", nargs="?", help="print the path of this config only")
    given = parser.parse_args(args)
    if given.name is not None:
        try:
            print(named(given.name))
        except ShippedConfigError as error:
            sys.exit(f"error: {error}")
        return
    width = max(map(len, configs()))
    lines: list[str] = []
    for folder in FOLDERS:
        lines.append(f"{folder} ({USED_BY[folder]}):")
        lines += [f"  {name:{width}}  {summary(path)}" for name, path in configs(folder).items()]
    print("\n".join(lines))
