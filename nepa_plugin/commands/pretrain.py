"""Pretrain a self-supervised method on a folder of images.

nepa pretrain --config nepa_vit_b --data.train_dir /data/imagenet/train
"""

from nepa_plugin.commands.naming import program
from nepa_plugin.training.cli import base_config
from nepa_plugin.training.cli import main as pretrain


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: Command line arguments; ``sys.argv`` by default.

    Raises:
        SystemExit: With status 2 and one line on stderr if the input is bad, 143 if stopped by SIGTERM.
    """
    pretrain(args, base_config(), program("pretrain", args))
