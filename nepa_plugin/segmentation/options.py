"""What a config asks for, held against what it can mean: keys that nothing reads, and numbers outside their range."""

import difflib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from nepa_plugin.runtime.ranges import (
    Fraction,
    FractionBelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveLearningRate,
    check_hints,
)
from nepa_plugin.segmentation.errors import ConfigError

#: Option -> its type and range; * stands for any name or number. What PyTorch or mmengine would take in silence.
NUMBERS: dict[str, Any] = {
    "train_cfg.max_iters": PositiveInt,
    "train_cfg.max_epochs": PositiveInt,
    "train_cfg.val_interval": PositiveInt,
    "train_dataloader.batch_size": PositiveInt,
    "val_dataloader.batch_size": PositiveInt,
    "test_dataloader.batch_size": PositiveInt,
    "train_dataloader.num_workers": NonNegativeInt,
    "val_dataloader.num_workers": NonNegativeInt,
    "test_dataloader.num_workers": NonNegativeInt,
    "optim_wrapper.optimizer.lr": PositiveLearningRate,
    "optim_wrapper.optimizer.weight_decay": NonNegativeFloat,
    "optim_wrapper.clip_grad.max_norm": PositiveFloat,
    "optim_wrapper.accumulative_counts": PositiveInt,
    "param_scheduler.*.begin": NonNegativeInt,
    "param_scheduler.*.end": PositiveInt,
    "param_scheduler.*.power": NonNegativeFloat,
    "param_scheduler.*.eta_min": NonNegativeFloat,
    "param_scheduler.*.start_factor": Fraction,
    "model.*.dropout_ratio": Fraction,
    "model.*.channels": PositiveInt,
    "model.*.num_classes": PositiveInt,
    "model.test_cfg.crop_size": tuple[PositiveInt, ...],
    "model.test_cfg.stride": tuple[PositiveInt, ...],
    "model.backbone.drop_path_rate": FractionBelowOne,
    "model.backbone.model_args.drop_path_rate": FractionBelowOne,
    "default_hooks.logger.interval": PositiveInt,
    "randomness.seed": NonNegativeInt,
}
#: Keys that mmengine and mmsegmentation read beside the runner's arguments.
_READ = {
    *("custom_imports", "tta_model", "tta_pipeline", "runner_type", "compile", "activation_checkpointing"),
    *("efficient_conv_bn_eval", "auto_scale_lr", "load_from", "resume", "launcher", "work_dir"),
}
#: What IoUMetric computes for each of its iou_metrics.
_SCORES = {
    "mIoU": ("mIoU", "mAcc"),
    "mDice": ("mDice", "mAcc"),
    "mFscore": ("mFscore", "mPrecision", "mRecall"),
}


def check_config(cfg: Config) -> None:
    """Check the options of a config that are numbers, the order of its schedule, and keys that were only made up.

    Args:
        cfg: mmengine's, with the options of the command line merged.

    Raises:
        ConfigError: Names the key, what it may be, and what it is.
    """
    _check_keys(cfg)
    options = cfg.to_dict()
    for pattern, hint in NUMBERS.items():
        for key, value in _find(options, pattern.split(".")):
            if value is None:
                continue  # the default of whatever reads it
            try:
                check_hints({key: hint}, {key: value})
            except ValueError as error:
                raise ConfigError(str(error)) from None
    _check_schedule(options)
    _check_evaluation(options)


def _check_keys(cfg: Config) -> None:
    """Refuse a key at the top that ``--cfg-options`` has made: in the file itself it may be a variable."""
    if not cfg.filename or not Path(cfg.filename).is_file():
        return
    read = {*inspect.signature(Runner.__init__).parameters, *_READ}
    if not (new := set(cfg.keys()) - read):
        return
    if made := sorted(new - Config.fromfile(cfg.filename, import_custom_modules=False).keys()):
        near = difflib.get_close_matches(made[0], sorted(read & cfg.keys()), n=1)
        options = f"{made[0]}.{key}" if isinstance(cfg[made[0]], dict) and (key := next(iter(cfg[made[0]]), "")) else ""
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ConfigError(f"--cfg-options {options or made[0]}: nothing reads {made[0]}{hint}")


def _find(node: Any, path: list[str], done: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for all that a pattern names."""
    if not path:
        yield ".".join(done), node
    elif isinstance(node, Mapping):
        names = list(node) if path[0] == "*" else [path[0]]
        for name in names:
            if name in node:
                yield from _find(node[name], path[1:], (*done, str(name)))
    elif isinstance(node, (list, tuple)) and path[0] == "*":
        for number, item in enumerate(node):
            yield from _find(item, path[1:], (*done, str(number)))


def _check_schedule(cfg: Mapping[str, Any]) -> None:
    schedulers = cfg.get("param_scheduler") or []
    steps, peak = _part(cfg, "train_cfg").get("max_iters"), dict(_find(cfg, ["optim_wrapper", "optimizer", "lr"]))
    for number, scheduler in enumerate(schedulers if isinstance(schedulers, (list, tuple)) else [schedulers]):
        if not isinstance(scheduler, Mapping):
            continue
        key, begin = f"param_scheduler.{number}", scheduler.get("begin", 0)
        by_step = not scheduler.get("by_epoch", True)
        end = scheduler.get("end") or (steps if by_step else None)
        if end is not None and begin >= end:
            last = f"{key}.end is" if scheduler.get("end") else "the run ends at train_cfg.max_iters ="
            raise ConfigError(
                f"{key} ({scheduler.get('type')}) begins at step {begin}, but {last} {end}. Raise it, or lower "
                f"{key}.begin, where the warm-up ends (param_scheduler.0.end)."
            )
        for lr in peak.values():
            if (low := scheduler.get("eta_min")) is not None and low > lr:
                raise ConfigError(f"{key}.eta_min {low:g} is above the peak, optim_wrapper.optimizer.lr {lr:g}.")


def _check_evaluation(cfg: Mapping[str, Any]) -> None:
    """Check what would fail at the first validation, when a part of the run is done."""
    test = _part(_part(cfg, "model"), "test_cfg")
    if (mode := test.get("mode", "whole")) not in ("whole", "slide"):
        raise ConfigError(f"model.test_cfg.mode={mode!r} is not one of 'whole', 'slide'.")
    if mode == "slide" and not {"crop_size", "stride"} <= test.keys():
        raise ConfigError("model.test_cfg.mode='slide' needs model.test_cfg.crop_size and model.test_cfg.stride.")
    scores: list[str] = []
    for split in ("test", "val"):
        evaluator = cfg.get(f"{split}_evaluator")
        if not isinstance(evaluator, Mapping) or evaluator.get("type") not in ("IoUMetric", "CountedIoUMetric"):
            scores = []
            continue
        metrics = _listed(evaluator.get("iou_metrics", "mIoU"))
        if wrong := [name for name in metrics if name not in _SCORES]:
            raise ConfigError(f"{split}_evaluator.iou_metrics has {wrong[0]!r}: choose among {', '.join(_SCORES)}.")
        prefix = f"{evaluator['prefix']}/" if evaluator.get("prefix") else ""
        scores = [prefix + name for name in ("aAcc", *(score for name in metrics for score in _SCORES[name]))]
    hook = _part(_part(cfg, "default_hooks"), "checkpoint")
    if scores and (wrong := [name for name in _listed(hook.get("save_best")) if name not in ("auto", *scores)]):
        raise ConfigError(
            f"default_hooks.checkpoint.save_best={wrong[0]!r} is no score of val_evaluator: choose among "
            f"{', '.join(scores)}."
        )


def _part(cfg: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of the config; empty where it is no mapping, which the build of that part says better."""
    return part if isinstance(part := cfg.get(key), Mapping) else {}


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


@HOOKS.register_module()
class ConfigCheckHook(Hook):
    """Calls ``options.check_config`` before anything is trained or tested."""

    priority = "HIGHEST"

    def before_run(self, runner: Any) -> None:
        """Check the config.

        Raises:
            ConfigError: If it cannot be meant.
        """
        check_config(runner.cfg)
