"""The pretraining command."""

import sys
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from pytorch_lightning.cli import LightningArgumentParser
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from nepa_plugin.data.module import ImageData
from nepa_plugin.methods import NEPA, Method
from nepa_plugin.methods.cost import training_cost
from nepa_plugin.runtime import shipped
from nepa_plugin.runtime.devices import resolve_devices
from nepa_plugin.training import auto
from nepa_plugin.training.command import RunCLI, is_rank_zero, run_command
from nepa_plugin.training.outputs import run_summary, write_outputs
from nepa_plugin.training.parser import PretrainParser
from nepa_plugin.training.run_folder import UsageError


class PretrainCLI(RunCLI):
    """Train one method on image folders into one run folder. See ``tools/pretrain.py``."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line, with numbers in the place of every ``auto``."""
        with auto.without_auto(args) as (given, wanted):
            if not wanted:
                super().parse_arguments(parser, given)
                return
            # --print_config ends the command: it must print the numbers
            super().parse_arguments(parser, [arg for arg in given if not arg.startswith("--print_config")])
            config, model = self.config, self.config.model
            if not issubclass(resolve_name(model.class_path), NEPA):
                raise UsageError(f"{wanted[0]}: auto follows NEPA's recipe; give {model.class_path} a number.")
            trainer = config.trainer
            devices = resolve_devices(trainer.accelerator, trainer.devices).count * trainer.num_nodes
            found = auto.resolve(wanted, auto.look_at(config, wanted, devices))
            for name, (value, reason) in found.items():
                rank_zero_info(f"{name}: auto is {value} ({reason}).")
            super().parse_arguments(parser, [*given, *(f"--{name}={value}" for name, (value, _) in found.items())])

    def link(self, parser: LightningArgumentParser) -> None:
        """Batch size and number of classes are those of the data."""
        parser.link_arguments("data.batch_size_per_device", "model.init_args.batch_size_per_device")
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")

    def check_options(self) -> None:
        """Refuse a number of classes."""
        if self.config.model.init_args.get("num_classes") != signature(Method).parameters["num_classes"].default:
            raise UsageError("model.num_classes follows from the images' folders: leave it out.")

    def run_folder(self, name: str | None) -> Path:
        """Return ``runs/NAME_OF_THE_CONFIG``."""
        return Path("runs") / (name or "pretrain")

    def check_model(self) -> None:
        """Count what a step costs, while the method is as it was built."""
        self.method = type(self.model).__name__  # sharding replaces the class
        if is_rank_zero():
            self.cost = training_cost(self.model, sizes=self.datamodule.sizes)

    def finish(self) -> None:
        """Export the backbone, draw the curves and write the summary."""
        if self.trainer.is_global_zero:
            seed = self.config.seed_everything
            write_outputs(self.run_dir, run_summary(self.trainer, self.method, self.clock, self.cost, seed))


def base_config() -> Path:
    """Return the file that is read before every config."""
    return shipped.folder("lightly_configs") / "base.yaml"


def main(args: list[str] | None = None, base_config: Path | None = None, prog: str | None = None) -> None:
    """Run the command.

    Args:
        args: Command line arguments; ``sys.argv`` by default.
        base_config: YAML file that is read before any ``--config``.
        prog: What the help calls the command; by default the file that was started.

    Raises:
        SystemExit: As :func:`~nepa_plugin.training.command.run_command`.
    """
    run_command(
        PretrainCLI,
        sys.argv[1:] if args is None else args,
        model_class=Method,
        datamodule_class=ImageData,
        subclass_mode_model=True,
        parser_class=PretrainParser,
        parser_kwargs={"default_config_files": [str(base_config)] if base_config else [], "prog": prog},
    )


if __name__ == "__main__":
    main(base_config=base_config())
