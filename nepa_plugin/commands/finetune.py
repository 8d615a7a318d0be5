"""Fine-tune a backbone on a folder of images with one sub-folder per class.

nepa finetune CHECKPOINT --data FOLDER --config vit_b_imagenet
"""

from nepa_plugin.commands.naming import program
from nepa_plugin.training.finetune import base_config
from nepa_plugin.training.finetune import main as finetune


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: Command line arguments; ``sys.argv`` by default.

    Raises:
        SystemExit: With status 2 and one line on stderr if the input is bad, 143 if stopped by SIGTERM.
    """
    finetune(args, base_config(), program("finetune", args))
