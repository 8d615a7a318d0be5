"""Resumed training follows the schedule and the optimizer's options that are asked for now, not the checkpoint's."""

import warnings
from typing import Any

from mmengine.optim import OptimWrapper

from nepa_plugin.checkpoints import CheckpointError
from nepa_plugin.segmentation.errors import ConfigError

#: What of a scheduler's state is its position, not the schedule.
_POSITION = ("optimizer", "last_step", "_global_step", "_last_value", "verbose")
#: What of a parameter group is not an option of the optimizer, or is compared as the schedule's.
_NOT_OPTIONS = ("params", "lr", "initial_lr", "lr_scale", "name")


def follow_config(runner: Any, checkpoint: dict) -> None:
    """Change what mmengine is about to restore, so that only the position in the schedule is the checkpoint's.

    mmengine restores the numbers of the schedule, too: with more steps the rest is trained at the old one's last
    learning rate, zero. Nothing is changed where the config asks for the same as before. Else mmengine's own schedulers
    are built anew and walked to the position, so that they have the values of an unbroken run of this config.

    Args:
        runner: mmengine's, with optimizer and schedulers built.
        checkpoint: What was read; changed in place.

    Raises:
        CheckpointError: If the optimizer's groups are others.
        ConfigError: If the checkpoint is past the end of the run.
    """
    step = checkpoint["meta"]["iter"]
    if step > runner.max_iters:
        raise ConfigError(
            f"The checkpoint is at step {step}, past the end of the run: train_cfg.max_iters is {runner.max_iters}. "
            "Raise it, or start anew in another --work-dir."
        )
    if step == runner.max_iters:
        runner.logger.warning(f"The checkpoint is at step {step} of {step}: there is nothing left to train.")
        return
    schedulers, wrapper = runner.param_schedulers or [], runner.optim_wrapper
    plain = isinstance(wrapper, OptimWrapper) and isinstance(schedulers, list)
    if not plain or any(getattr(scheduler, "need_val_args", False) for scheduler in schedulers):
        runner.logger.warning("Several optimizers, or a schedule that depends on metrics: it goes on as it was saved.")
        return
    before = checkpoint.get("param_schedulers")
    changes = [] if before is None else _schedule_changes(before, schedulers)
    old_lr = None
    if (saved := checkpoint.get("optimizer")) is None:
        runner.logger.warning("The checkpoint holds no state of the optimizer: its averages start from zero.")
    else:
        groups = _saved_groups(saved)
        _check_groups(groups, wrapper.param_groups)
        changes += _option_changes(groups, wrapper.param_groups)
        old_lr = max(group["lr"] for group in groups)
    if before is not None and not changes:
        return
    _walk(schedulers, step, checkpoint["meta"]["epoch"])
    checkpoint["param_schedulers"] = [scheduler.state_dict() for scheduler in schedulers]
    if saved is not None:
        for group, own in zip(groups, wrapper.param_groups, strict=True):
            group.update({key: value for key, value in own.items() if key != "params"})
    new_lr = max(group["lr"] for group in wrapper.param_groups)
    runner.logger.warning(
        f"Resumed after step {step} with {', '.join(changes) or 'a schedule that was not saved'}. The learning rate "
        f"goes on with {new_lr:.4g}" + ("." if old_lr is None else f", where the old schedule had {old_lr:.4g}.")
    )


def check_end_of_schedule(runner: Any) -> None:
    """Refuse a run whose last steps would have a learning rate of zero.

    Args:
        runner: mmengine's, with schedulers built.

    Raises:
        ConfigError: If the schedule reaches zero before the run ends.
    """
    schedulers = runner.param_schedulers
    if not isinstance(schedulers, list) or not schedulers:
        return
    number, last = max(enumerate(schedulers), key=lambda item: item[1].end)
    end, what = (runner.max_epochs, "max_epochs") if last.by_epoch else (runner.max_iters, "max_iters")
    if last.param_name == "lr" and last.end < end and getattr(last, "eta_min", None) == 0:
        raise ConfigError(
            f"param_scheduler.{number} ({type(last).__name__}) ends at {last.end} with a learning rate of 0, "
            f"train_cfg.{what} is {end}: the last {end - last.end} would train nothing. Set "
            f"param_scheduler.{number}.end={end}; without an end, a schedule lasts as long as the run."
        )


def _numbers(state: dict) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in _POSITION}


def _schedule_changes(before: list[dict], schedulers: list[Any]) -> list[str]:
    if len(before) != len(schedulers):
        return [f"{len(schedulers)} schedulers instead of {len(before)}"]
    changes: list[str] = []
    for i, (state, scheduler) in enumerate(zip(before, schedulers, strict=True)):
        old, new = _numbers(state), _numbers(scheduler.state_dict())
        if old.keys() != new.keys():
            changes.append(f"param_scheduler.{i} a {type(scheduler).__name__} instead of another kind")
            continue
        if old.pop("base_values") != (peaks := new.pop("base_values")):
            peak = f"peak learning rate {max(peaks):.4g} instead of {max(state['base_values']):.4g}"
            if max(peaks) == max(state["base_values"]):
                peak = "another decay of the learning rate over the layers"
            changes += [] if peak in changes else [peak]
        changes += [
            f"param_scheduler.{i}.{key} {new[key]} instead of {old[key]}"
            for key in new
            if old[key] != new[key] and key != "total_iters"  # end less begin
        ]
    return changes


def _saved_groups(optimizer: dict) -> list[dict]:
    base = optimizer.get("base_param_settings")  # mmengine schedules a group of no parameters, too
    return [*optimizer["param_groups"], *([] if base is None else [base])]


def _check_groups(saved: list[dict], own: list[dict]) -> None:
    sizes = [[len(group["params"]) for group in groups] for groups in (saved, own)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"The checkpoint's optimizer has {sum(sizes[0])} parameters in {len(saved)} groups, this run's "
            f"{sum(sizes[1])} in {len(own)}: paramwise_cfg, frozen_stages or the optimizer are others. Change them "
            "back, or start from the weights alone, with load_from in place of --resume."
        )


def _option_changes(saved: list[dict], own: list[dict]) -> list[str]:
    changes: dict[str, str] = {}
    for old, new in zip(saved, own, strict=True):
        for key in new.keys() - _NOT_OPTIONS:
            if key in old and old[key] != new[key]:
                changes.setdefault(key, f"{key} {new[key]} instead of {old[key]}")
    return [changes[key] for key in sorted(changes)]


def _walk(schedulers: list[Any], steps: int, epochs: int) -> None:
    """Step the schedulers as mmengine's hook did on the way to a position."""
    per_epoch = steps // epochs if epochs else 0  # a loop of steps counts no epochs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "before optimizer.step()"
        for step in range(1, steps + 1):
            for scheduler in schedulers:
                if not scheduler.by_epoch or (per_epoch and step % per_epoch == 0):
                    scheduler.step()
