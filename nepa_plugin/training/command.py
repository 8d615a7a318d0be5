"""A training command: LightningCLI with a run folder, device and batch checks, and errors of one line."""

import contextlib
import sys
import traceback
import warnings
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback, ModelSummary
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy, Strategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch.nn.parallel import DistributedDataParallel

from nepa_plugin.checkpoints import CheckpointError, read_tensors
from nepa_plugin.data.errors import DataError
from nepa_plugin.methods.optimization import DivergenceError
from nepa_plugin.runtime.boundary import boundary, in_words
from nepa_plugin.runtime.devices import check_compiler, check_launch, resolve_devices
from nepa_plugin.runtime.ranges import NonNegativeFloat, PositiveInt, Range, check_hints
from nepa_plugin.runtime.sharding import ShardedStrategy
from nepa_plugin.runtime.step_seed import StepSeed
from nepa_plugin.training.callbacks import EpochLines, LastCheckpoint, LoggedBar, Parameters, RunClock
from nepa_plugin.training.configs import merged_configs
from nepa_plugin.training.metrics_file import KeepingCSVLogger, KeptMetrics
from nepa_plugin.training.parser import plain
from nepa_plugin.training.run_folder import RunFolder, UsageError, check_resumable
from nepa_plugin.training.stopping import StopTogether

#: Options of the run and of Lightning's trainer whose range neither of them checks.
_AT_LEAST_ONE_OR_ALL = Annotated[int, Range(-1), Range(exclude=0)]
RANGES = {
    "global_batch_size": PositiveInt | None,
    "checkpoint_every_n_steps": PositiveInt,
    "data.batch_size_per_device": PositiveInt,
    "trainer.num_nodes": PositiveInt,
    "trainer.max_epochs": _AT_LEAST_ONE_OR_ALL | None,
    "trainer.max_steps": _AT_LEAST_ONE_OR_ALL,
    "trainer.accumulate_grad_batches": PositiveInt,
    "trainer.log_every_n_steps": PositiveInt | None,
    "trainer.check_val_every_n_epoch": PositiveInt | None,
    "trainer.num_sanity_val_steps": Annotated[int, Range(-1)] | None,
    "trainer.gradient_clip_val": NonNegativeFloat | None,
    "trainer.limit_train_batches": Annotated[float, Range(0, open_low=True)] | None,
}


def is_rank_zero() -> bool:
    """Whether this process is the run's first."""
    return getattr(rank_zero_only, "rank", 0) == 0


class RunCLI(LightningCLI):
    """Train one model on images into one run folder."""

    #: Where the configs are that come with the command.
    configs = "lightly_configs"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that belong to the run as a whole, and tie together what must agree."""
        parser.add_argument(
            "--run_dir",
            type=Optional[str],
            default=None,
            help="Folder for everything the run writes. Default: runs/NAME_OF_THE_CONFIG.",
        )
        parser.add_argument(
            "--ckpt_path",
            type=Optional[str],
            default=None,
            help="Resume: 'last' from the run folder's last.ckpt, 'auto' the same if there is one, or a .ckpt file.",
        )
        parser.add_argument(
            "--global_batch_size",
            type=Optional[int],
            default=None,
            help="Images per optimizer step over all devices, reached by accumulating gradients.",
        )
        parser.add_argument(
            "--checkpoint_every_n_steps", type=int, default=1000, help="Optimizer steps between checkpoints."
        )
        parser.add_argument(
            "--compile",
            type=bool,
            default=False,
            help="Compile the transformer blocks and the loss with torch.compile.",
        )
        parser.link_arguments("seed_everything", "data.seed")
        self.link(parser)

    def link(self, parser: LightningArgumentParser) -> None:
        """Tie together what must agree between the data and the model of this command."""
        raise NotImplementedError

    def before_instantiate_classes(self) -> None:
        """Check what can be checked without building anything."""
        config = self.config
        check_hints(RANGES, {name: config.get(name) for name in RANGES})
        self.check_options()
        if config.run_dir is None:
            named = [str(c) for c in config.get("config") or []]
            config.run_dir = str(self.run_folder(Path(named[-1]).stem if named else None))
        self.run_dir = Path(config.run_dir)
        self.folder = RunFolder(self.run_dir)
        trainer = config.trainer
        self.devices = resolve_devices(trainer.accelerator, trainer.devices)
        check_launch(self.devices.count * trainer.num_nodes)
        # Other processes start when the first has written.
        self.resume_from = self.folder.resume_from(config.ckpt_path, first=is_rank_zero())
        if config.global_batch_size is not None:
            self._accumulate()

    def check_options(self) -> None:
        """Check what this command alone has, without building anything."""

    def run_folder(self, name: str | None) -> Path:
        """Return where a run goes by default, by the name of its config."""
        raise NotImplementedError

    def own_callbacks(self) -> list[Callback]:
        """Return callbacks that this command alone has."""
        return []

    def _accumulate(self) -> None:
        config = self.config
        if config.trainer.accumulate_grad_batches != 1:
            raise UsageError(
                "trainer.accumulate_grad_batches follows from global_batch_size; to set it yourself, pass "
                "--global_batch_size null."
            )
        per_device, world_size = config.data.batch_size_per_device, self.devices.count * config.trainer.num_nodes
        accumulate, rest = divmod(config.global_batch_size, per_device * world_size)
        if rest or not accumulate:
            raise UsageError(
                f"global_batch_size {config.global_batch_size} is not a multiple of {per_device} images per device x "
                f"{world_size} device(s). Change --data.batch_size_per_device, or --global_batch_size to "
                f"{max(1, round(config.global_batch_size / (per_device * world_size))) * per_device * world_size}."
            )
        self.accumulate = accumulate

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer: device, precision, loggers and callbacks that every run has."""
        given = self._get(self.config_init, "trainer")
        kwargs |= {
            "accelerator": self.devices.accelerator,
            "devices": self.devices.devices,
            "precision": given.precision or ("bf16-mixed" if self.devices.accelerator == "cuda" else "32-true"),
            "default_root_dir": str(self.run_dir),
            "sync_batchnorm": given.sync_batchnorm or self.devices.accelerator == "cuda",  # there is none for the CPU
            "use_distributed_sampler": False,  # the data module's sampler is one already, and can resume
            "strategy": self._strategy(given.strategy),
        }
        if self.config.global_batch_size is not None:
            kwargs["accumulate_grad_batches"] = self.accumulate
        if given.logger in (None, True):
            kwargs["logger"] = [
                KeepingCSVLogger(self.run_dir),
                TensorBoardLogger(str(self.run_dir), name="tensorboard", version="", purge_step=self._steps_so_far()),
            ]
        self.clock = RunClock()
        own = given.callbacks or []
        callbacks = [*(own if isinstance(own, list) else [own]), self.clock]
        callbacks += [
            StepSeed(self.datamodule.seed),
            StopTogether(),
            *self.own_callbacks(),
            KeptMetrics(),
            LastCheckpoint(self.run_dir / "checkpoints", self.config.checkpoint_every_n_steps),
        ]
        if given.enable_progress_bar in (None, True):
            terminal = sys.stdout.isatty()
            callbacks.append(LoggedBar(refresh_rate=10, leave=False) if terminal else EpochLines(self.clock))
            kwargs["enable_progress_bar"] = terminal
        if given.enable_model_summary in (None, True) and not any(isinstance(each, ModelSummary) for each in callbacks):
            callbacks.append(Parameters())
            kwargs["enable_model_summary"] = False  # Lightning's own
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def _steps_so_far(self) -> int | None:
        """Return the steps of the checkpoint to go on from; what was logged after it is trained again."""
        if self.resume_from is None:
            return None
        checkpoint = read_tensors(self.resume_from, mmap=True)
        steps = checkpoint.get("global_step") if isinstance(checkpoint, dict) else None
        if not isinstance(steps, int):
            raise UsageError(f"--ckpt_path: {self.resume_from} is no checkpoint of a training run.")
        return steps

    def _strategy(self, given: str | Strategy) -> str | Strategy:
        """Return what Lightning takes for ``--trainer.strategy``: its own names, but for these three."""
        if given == "fsdp":
            return ShardedStrategy()
        several = self.devices.count * self.config.trainer.num_nodes > 1
        if given == "ddp" or (given == "auto" and several):
            # Buffers are BatchNorm's statistics and constants: training needs no broadcast of them in every step.
            new = "forward_sync_buffers" in signature(DistributedDataParallel).parameters  # its name since torch 2.14
            buffers: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
            return DDPStrategy(gradient_as_bucket_view=True, **buffers)
        return given

    def check(self) -> None:
        """Check run folder, images and checkpoint before training."""
        if is_rank_zero():
            self.folder.lock()
        try:
            self._check()
        except BaseException:
            self.folder.unlock()
            raise

    def _check(self) -> None:
        if is_rank_zero():
            self.datamodule.check_method(self.model)
            skipped = self.datamodule.check_images()
            if skipped:
                rank_zero_info(f"Skipped {skipped} file(s) that cannot be read as images.")
            world_size = self.devices.count * self.trainer.num_nodes
            self.datamodule.check_batch(world_size, self.trainer.accumulate_grad_batches)
            if self.resume_from is not None:
                check_resumable(self.resume_from, self.model)
        self.check_model()
        if self.config.compile:
            check_compiler("cuda" if self.devices.accelerator == "cuda" else "cpu")
            self.model.compile_step()

    def check_model(self) -> None:
        """Check what this command alone has, with the model at hand."""

    def finish(self) -> None:
        """Write what a finished run leaves behind."""
        raise NotImplementedError

    def fit(self) -> None:
        """Train, then write what the run leaves behind."""
        if is_rank_zero():
            self.folder.prepare()
            self._save_config()
        try:
            self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.resume_from, weights_only=True)
            self.finish()
        finally:
            self.folder.unlock()

    def failure(self, error: BaseException) -> str:
        """Return what ended the training, in one line; what is not ours goes with its traceback into a file."""
        if isinstance(error, (DataError, CheckpointError)):
            return in_words(error)
        log, said = self.run_dir / "error.log", in_words(error)
        with contextlib.suppress(OSError):
            log.write_text("".join(traceback.format_exception(error)))
        if isinstance(error, torch.OutOfMemoryError):
            said = (
                "The GPU's memory is too small: lower --data.batch_size_per_device (--global_batch_size keeps a step's "
                f"batch), or pass --model.grad_checkpointing true. {said}"
            )
        return f"{said} ({log} has the traceback.)"

    def _save_config(self) -> None:
        path, n = self.run_dir / "config.yaml", 1
        while path.exists():  # a resumed run may have other options; both stay
            n += 1
            path = self.run_dir / f"config-{n}.yaml"
        self.parser.save(self.config, str(path), skip_none=False, overwrite=False)


def run_command(cls: type[RunCLI], args: list[str], **kwargs: Any) -> None:
    """Run a training command.

    Args:
        cls: The command.
        args: Command line arguments.
        **kwargs: Arguments of the command's class.

    Raises:
        SystemExit: With one line on stderr: status 2 if the input is bad, 1 if training diverged; 143 if stopped by
            SIGTERM.
    """
    with boundary(TypeError, MisconfigurationException, explain=_in_words):
        with merged_configs(args, cls.configs) as expanded:
            cli = _build(cls, expanded, **kwargs)
        cli.check()
    try:
        with boundary(torch.OutOfMemoryError, explain=cli.failure), warnings.catch_warnings():
            # momentum encoders are meant to be in evaluation mode; the other is between Lightning and PyTorch
            warnings.filterwarnings("ignore", message="Found .* in eval mode at the start of training")
            warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated")
            cli.fit()
    except DivergenceError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except SIGTERMException:
        sys.exit(143)  # Lightning's own status would be 0, as if the run had finished


def _build(cls: type[RunCLI], args: list[str], **kwargs: Any) -> RunCLI:
    with warnings.catch_warnings():
        # these are the command line's arguments, with the config files merged
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        return cls(
            run=False,
            save_config_callback=None,
            auto_configure_optimizers=False,
            seed_everything_default=1337,
            args=args,
            **kwargs,
        )


def _in_words(error: BaseException) -> str:
    """Return what is wrong with the options, without what jsonargparse wraps around it."""
    own, inner = (ValueError, OSError, MisconfigurationException), error
    while type(error) is ValueError and inner is not None:  # jsonargparse's, around that of a method's constructor
        inner = inner.__cause__ or inner.__context__  # type: ignore[assignment]
        if isinstance(inner, own) and type(inner) is not ValueError and in_words(inner) in in_words(error):
            return in_words(inner)
    return plain(in_words(error))
