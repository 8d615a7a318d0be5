"""Hooks that stop a run that would train or test something else than what was asked for."""

from pathlib import Path
from typing import Any

from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop

from nepa_plugin.checkpoints import BACKBONE_CONFIG_KEY, CheckpointError, backbone_config, check_fit
from nepa_plugin.segmentation.backbone import TimmViT
from nepa_plugin.segmentation.errors import ConfigError
from nepa_plugin.segmentation.schedules import check_end_of_schedule, follow_config


@HOOKS.register_module()
class CheckpointGuardHook(Hook):
    """Makes checkpoints complete, and loads them completely or not at all.

    A resumed run follows the schedule of the config in force, see :func:`~.schedules.follow_config`.
    Written checkpoints also say how their backbone is built, so that ``load_backbone("iter_N.pth")`` can read it.
    mmengine itself warns of keys that do not fit and goes on with random weights.
    """

    priority = "VERY_HIGH"

    def before_train(self, runner: Any) -> None:
        """Stop before a new run overwrites the checkpoints of another one, or trains at a learning rate of zero.

        Raises:
            FileExistsError: If the work directory holds a run and this one does not resume it.
            ConfigError: If the schedule ends at zero before the run does.
        """
        check_end_of_schedule(runner)
        if (Path(runner.work_dir) / "last_checkpoint").is_file() and not runner._resume:
            raise FileExistsError(
                f"{runner.work_dir} holds the checkpoints of another run. Add --resume to go on with it, or choose "
                "another --work-dir."
            )

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Add the timm config of the model's :class:`TimmViT`."""
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
        CheckpointError: If it does not fit; says which weights.
    """
    state = checkpoint.get("state_dict")
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{source} is no checkpoint of a segmentation run. A pretrained backbone goes to "
            "model.backbone.init_cfg.checkpoint."
        )
    check_fit(model, {key.removeprefix("module."): value for key, value in state.items()}, source)


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
