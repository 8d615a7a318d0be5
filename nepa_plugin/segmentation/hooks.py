"""Hooks that stop a run that would train or test something else than what was asked for."""

import math
from pathlib import Path
from typing import Any

from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop

from nepa_plugin.checkpoints import BACKBONE_CONFIG_KEY, CheckpointError, backbone_config, check_fit
from nepa_plugin.runtime.locks import FolderInUseError, lock_folder
from nepa_plugin.segmentation.backbone import TimmViT
from nepa_plugin.segmentation.errors import ConfigError, DivergenceError
from nepa_plugin.segmentation.saving import holds_run, newest_whole_checkpoint, write_whole_files
from nepa_plugin.segmentation.schedules import check_end_of_schedule, follow_config


@HOOKS.register_module()
class CheckpointGuardHook(Hook):
    """Makes checkpoints complete, and loads them completely or not at all; ends a run that diverges.

    Checkpoints are written whole or not at all, see :class:`~.saving.WholeFileBackend`, hold finite weights, and say
    how their backbone is built, so that ``load_backbone("iter_N.pth")`` can read them. mmengine itself warns of keys
    that do not fit and goes on with random weights. A resumed run follows the schedule of the config in force, see
    :func:`~.schedules.follow_config`; where the last checkpoint is damaged, the newest that is whole is taken.

    Args:
        tolerate: Steps in a row whose loss may be not finite. More than 0 is for float16, whose loss scaling leaves out
            such steps; elsewhere the weights are lost with the first.
    """

    priority = "VERY_HIGH"

    def __init__(self, tolerate: int = 0) -> None:
        self.tolerate, self._in_a_row = tolerate, 0

    def before_run(self, runner: Any) -> None:
        """Keep other runs out of the folder, and choose the checkpoint to resume from, before mmengine does.

        Raises:
            CheckpointError: If there are some and all are damaged.
            ConfigError: If another run is at work there.
        """
        if not isinstance(runner._train_loop, BaseLoop):
            return
        if is_main_process():
            try:
                self._lock = lock_folder(runner.work_dir, "--work-dir")  # open as long as this hook lives
            except FolderInUseError as error:
                raise ConfigError(str(error)) from error
        write_whole_files(runner)
        if runner._resume and runner._load_from is None:
            runner._load_from = newest_whole_checkpoint(runner.work_dir, runner.logger)

    def before_train(self, runner: Any) -> None:
        """Stop before a new run overwrites the checkpoints of another one, or trains at a learning rate of zero.

        Raises:
            FileExistsError: If the work directory holds a run and this one does not resume it.
            ConfigError: If the schedule ends at zero before the run does.
        """
        check_end_of_schedule(runner)
        if holds_run(runner.work_dir) and not runner._resume:
            raise FileExistsError(
                f"{runner.work_dir} holds the checkpoints of another run. Add --resume to go on with it, or choose "
                "another --work-dir."
            )

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Look at the loss, which mmengine has read from the device for its log.

        Raises:
            DivergenceError: If it is not finite, more often in a row than is tolerated.
        """
        scalars = runner.message_hub.log_scalars
        if (key := "train/loss") not in scalars:
            return
        loss = scalars[key].current()
        self._in_a_row = 0 if math.isfinite(loss) else self._in_a_row + 1
        if self._in_a_row > self.tolerate:
            raise DivergenceError(f"The loss is {loss} at step {runner.iter + 1}. {_after_divergence(runner)}")

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Add the timm config of the model's :class:`TimmViT`.

        Raises:
            DivergenceError: If a weight is not finite. Nothing is written.
        """
        weights = checkpoint["state_dict"].items()
        if infinite := [k for k, v in weights if v.is_floating_point() and not v.isfinite().all()]:
            raise DivergenceError(
                f"{len(infinite)} weights, such as {infinite[0]}, are not finite at step {checkpoint['meta']['iter']}; "
                f"they are not saved. {_after_divergence(runner)}"
            )
        if isinstance(backbone := getattr(unwrapped(runner.model), "backbone", None), TimmViT):
            checkpoint[BACKBONE_CONFIG_KEY] = backbone_config(backbone.vit)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Compare the checkpoint with the model; of a schedule, take the position only.

        Raises:
            CheckpointError: If a weight is missing, left over, of another shape or not finite; names them.
            ConfigError: If the run to resume is past its end.
        """
        check_segmentor(unwrapped(runner.model), checkpoint, str(runner._load_from or "the checkpoint"))
        if runner._resume and isinstance(runner._train_loop, BaseLoop):
            follow_config(runner, checkpoint)


def _after_divergence(runner: Any) -> str:
    rate = max(group["lr"] for group in runner.optim_wrapper.param_groups)
    last = Path(runner.work_dir) / "last_checkpoint"
    kept = f"{last.read_text().strip()} has finite weights: add --resume. " if last.is_file() else ""
    return (
        f"{kept}Lower optim_wrapper.optimizer.lr (the step's is {rate:.3g}), lengthen the warm-up, or clip the "
        "gradient: optim_wrapper.clip_grad.max_norm=1."
    )


def unwrapped(model: Any) -> Any:
    """Return the segmentor inside a distributed wrapper, a test-time augmentation, or both."""
    while hasattr(model, "module"):
        model = model.module
    return model


def check_segmentor(model: Any, checkpoint: dict, source: str) -> None:
    """Check that a checkpoint is one of this segmentor, weight by weight.

    Args:
        model: The segmentor.
        checkpoint: What was read from the file.
        source: What to call it in the error.

    Raises:
        CheckpointError: If it does not fit; says which weights, or what of the backbone.
    """
    state = checkpoint.get("state_dict")
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{source} is no checkpoint of a segmentation run. A pretrained backbone goes to "
            "model.backbone.init_cfg.checkpoint."
        )
    check_fit(model, {key.removeprefix("module."): value for key, value in state.items()}, source)
    config, backbone = checkpoint.get(BACKBONE_CONFIG_KEY), getattr(model, "backbone", None)
    if isinstance(config, dict) and isinstance(backbone, TimmViT):
        backbone.check_built_as(config, source)


@HOOKS.register_module()
class ClassCountHook(Hook):
    """Compares the heads' number of classes with the datasets' before a run starts."""

    def before_run(self, runner: Any) -> None:
        """Check the loops that are built.

        Raises:
            ConfigError: If a head has another number of classes than a dataset.
        """
        model = unwrapped(runner.model)
        heads = {name: getattr(model, name, None) for name in ("decode_head", "auxiliary_head")}
        for loop in (runner._train_loop, runner._val_loop, runner._test_loop):
            if not isinstance(loop, BaseLoop):
                continue
            dataset = loop.dataloader.dataset
            classes = getattr(dataset, "metainfo", {}).get("classes")
            for name, head in heads.items():
                count = getattr(head, "num_classes", None)
                if classes is not None and count is not None and count != len(classes):
                    raise ConfigError(
                        f"model.{name}.num_classes is {count}, but {type(dataset).__name__} has {len(classes)} "
                        f"classes. Set model.{name}.num_classes={len(classes)}."
                    )


@HOOKS.register_module()
class BatchSizeHook(Hook):
    """Says how many images a step really has, and warns if the recipe's learning rate is for another number.

    Args:
        recipe: Images per optimizer step that the schedule is for.
    """

    def __init__(self, recipe: int) -> None:
        self.recipe = recipe

    def before_train(self, runner: Any) -> None:
        """Log a line."""
        per_device, devices = runner.train_dataloader.batch_size, get_world_size()
        accumulated = getattr(runner.optim_wrapper, "_accumulative_counts", 1)
        total = per_device * devices * accumulated
        runner.logger.info(
            f"Global batch {total} = {per_device} per device x {devices} device(s) x {accumulated} accumulated"
        )
        if total != self.recipe:
            runner.logger.warning(
                f"The schedule is for {self.recipe} images per step, this run has {total}. Set "
                "train_dataloader.batch_size, or change the learning rate with it."
            )
