"""The fine-tuning command."""

import sys
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import Callback
from pytorch_lightning.cli import LightningArgumentParser

from nepa_plugin.checkpoints import Weights, open_backbone
from nepa_plugin.data.labelled import LabelledData
from nepa_plugin.finetuning import ClassifierModule, Recipe, Scores, classifier
from nepa_plugin.runtime import shipped
from nepa_plugin.runtime.ranges import NonNegativeInt, PositiveInt, check_ranges
from nepa_plugin.training.command import RunCLI, run_command
from nepa_plugin.training.outputs import finetuning_summary, write_classifier
from nepa_plugin.training.parser import RunParser
from nepa_plugin.training.run_folder import UsageError


class Finetune(ClassifierModule):
    """A backbone, fine-tuned on images with classes by the published recipe.

    Args:
        init_from: What to start from: anything ``load_backbone`` reads, or a timm name with published weights. Without
            it, the network of ``backbone`` is trained from scratch.
        batch_size_per_device: Images per device and forward pass; with devices and accumulation it scales the learning
            rate.
        classes: Names of the classes; they follow from the images' folders.
        seed: Of fresh weights; the command sets it to ``seed_everything``.
        backbone: Where there is no ``init_from``, whose architecture to train: a timm name, or a checkpoint.
        backbone_args: Arguments of the model that override its own, such as ``img_size``.
        weights: Of a run folder of the published code: its ``average`` or its ``raw`` ones.
        nonfinite_steps: Steps whose loss or gradient may be not finite: their gradient is set to zero, and one more
            ends the run.
        grad_checkpointing: Recompute each block's activations in the backward pass instead of keeping them.
        **recipe: Fields of :class:`~nepa_plugin.finetuning.Recipe`.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        CheckpointError: If it does not fit.
        ValueError: If an option is out of its range, or there is nothing to start from.
    """

    def __init__(
        self,
        init_from: str | None = None,
        batch_size_per_device: PositiveInt = 128,
        classes: list[str] | None = None,
        seed: NonNegativeInt = 0,
        backbone: str | None = None,
        backbone_args: dict[str, Any] | None = None,
        weights: Weights = "average",
        nonfinite_steps: NonNegativeInt = 0,
        grad_checkpointing: bool = False,
        **recipe: Any,
    ) -> None:
        check_ranges(Finetune, {"nonfinite_steps": nonfinite_steps}, "model.")
        how = Recipe(**recipe)
        source = backbone if init_from is None else init_from
        if source is None:
            raise ValueError(
                "There is nothing to fine-tune: give a checkpoint first, as in `finetune CHECKPOINT --data FOLDER`, or "
                "train from scratch with `finetune none --model.backbone NAME_OR_CHECKPOINT`."
            )
        if init_from is not None and backbone is not None:
            raise ValueError("model.backbone is for training from scratch (`finetune none`): init_from has its own.")
        if not classes:
            raise ValueError("model.classes follows from the images' folders.")
        model = open_backbone(source, backbone_args, init_from is None, seed, weights)
        absent = [n for n in ("patch_embed", "blocks", "norm", "num_prefix_tokens") if not hasattr(model, n)]
        if absent:
            raise ValueError(
                f"{source}: {type(model).__name__} has no {', '.join(absent)}: it is no Vision Transformer."
            )
        network: Any = classifier(model, classes, how)
        if grad_checkpointing:
            network.set_grad_checkpointing()
        super().__init__(network, how, batch_size_per_device, nonfinite_steps)
        self.save_hyperparameters(logger=False)


class FinetuneCLI(RunCLI):
    """Fine-tune one network into one run folder. See ``tools/finetune.py``."""

    configs = "lightly_configs/finetune"

    def link(self, parser: LightningArgumentParser) -> None:
        """Batch size and classes are those of the data, and one seed is for all."""
        parser.link_arguments("data.batch_size_per_device", "model.batch_size_per_device")
        parser.link_arguments("data.classes", "model.classes", apply_on="instantiate")
        parser.link_arguments("seed_everything", "model.seed")

    def check_options(self) -> None:
        """Refuse what fine-tuning cannot do."""
        config = self.config
        if config.trainer.strategy == "fsdp":
            raise UsageError("trainer.strategy fsdp is for pretraining: fine-tuning keeps the weights whole, with ddp.")
        odd = config.data.batch_size_per_device % 2
        if odd and (config.model.mixup or config.model.cutmix):
            raise UsageError(
                f"data.batch_size_per_device {config.data.batch_size_per_device} is odd, and mixup takes images in "
                "pairs: make it even, or pass --model.mixup 0 --model.cutmix 0."
            )

    def run_folder(self, name: str | None) -> Path:
        """Return ``runs/finetune_NAME_OF_THE_CONFIG``."""
        return Path("runs") / (f"finetune_{name}" if name else "finetune")

    def own_callbacks(self) -> list[Callback]:
        """Keep the scores."""
        self.scores = Scores(keep_best=self.model.recipe.select == "best")
        return [self.scores]

    def check_model(self) -> None:
        """Refuse to look for the best epoch where nothing is scored."""
        if self.datamodule.val_images is None and self.scores.keep_best:
            raise UsageError("model.select best needs validation images: give data.val_dir, or --model.select last.")

    def finish(self) -> None:
        """Score what the last epoch left, if it was not, and write the classifier and the summary."""
        trainer = self.trainer
        if self.datamodule.val_images is not None and self.scores.last.get("epoch") != trainer.current_epoch:
            trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        if trainer.is_global_zero:
            seed = self.config.seed_everything
            write_classifier(self.run_dir, self.scores, finetuning_summary(trainer, self.scores, self.clock, seed))


def base_config() -> Path:
    """Return the file that is read before every config: the published recipe of ViT-B."""
    return shipped.folder(FinetuneCLI.configs) / "base.yaml"


def expand(args: list[str]) -> list[str]:
    """Return the command line as LightningCLI takes it.

    ``BACKBONE`` in the first place is ``--model.init_from BACKBONE``, or nothing if it is ``none``, and ``--data
    FOLDER`` is ``--data.folder FOLDER``.
    """
    short = {"--data": "--data.folder"}
    full = ["=".join([short.get(name, name), *value]) for name, *value in (arg.split("=", 1) for arg in args)]
    if full and not full[0].startswith("-"):
        full = full[1:] if full[0].lower() in ("none", "null") else ["--model.init_from", full[0], *full[1:]]
    return full


def main(args: list[str] | None = None, base_config: Path | None = None, prog: str | None = None) -> None:
    """Run the command.

    Args:
        args: Command line arguments; ``sys.argv`` by default.
        base_config: YAML file that is read before any ``--config``.
        prog: What the help calls the command; by default the file that was started.

    Raises:
        SystemExit: As :func:`~nepa_plugin.training.command.run_command`.
    """
    defaults = {"default_config_files": [str(base_config)] if base_config else []}
    run_command(
        FinetuneCLI,
        expand(sys.argv[1:] if args is None else args),
        model_class=Finetune,
        datamodule_class=LabelledData,
        parser_class=RunParser,
        parser_kwargs=defaults | {"prog": f"{prog or Path(sys.argv[0]).name} BACKBONE --data FOLDER"},
    )
