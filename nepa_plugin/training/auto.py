"""The value ``auto``: options of NEPA's recipe that follow from the number of images, their size and the global batch.

The published numbers are for 1.28 million images and steps of 4096. With few images they ask for a handful of steps per
epoch, at a learning rate that was scaled down with the batch. ``auto`` in the place of a number takes one that keeps
what the published recipe keeps, and says why; ``config.yaml`` in the run's folder has the numbers.
"""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from nepa_plugin.data.evaluation import spread
from nepa_plugin.data.files import IMAGE_ERRORS
from nepa_plugin.data.module import ImageData
from nepa_plugin.training.configs import read_config
from nepa_plugin.training.run_folder import UsageError

AUTO = "auto"
#: The published run (arXiv 2512.16922).
EPOCHS, STEPS, BATCH, BASE_LR, WARMUP, MIN_CROP = 1600, 500_000, 4096, 3e-4, 0.025, 0.08
#: Steps below which a run is too short to learn much, of the warm-up, and the largest part that the warm-up may take.
FEWEST_STEPS, WARMUP_STEPS, LONGEST_WARMUP = 10_000, 500, 0.1
#: Images whose size is looked at.
LOOKED_AT = 64


@dataclass(frozen=True)
class Facts:
    """What the numbers follow from.

    Attributes:
        images: Training images of one epoch.
        batch: Images per optimizer step, over all devices.
        img_size: What the model takes, in pixels.
        side: Of the images as they are stored, the median of the root of width times height; nothing where that is not
            known.
        epochs: Passes over the images, where they are given.
        max_steps: Steps at which the run ends, whatever the epochs; -1 for none.
    """

    images: int
    batch: int
    img_size: int
    side: float | None
    epochs: int | None = None
    max_steps: int = -1

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass."""
        return max(1, self.images // self.batch)


def resolve(wanted: list[str], facts: Facts) -> dict[str, tuple[Any, str]]:
    """Return the value of each option that is ``auto``, and the reason in words.

    Args:
        wanted: Names, as in :data:`OPTIONS`.
        facts: What they follow from.

    Raises:
        UsageError: If one cannot be known.
    """
    found: dict[str, tuple[Any, str]] = {}
    epochs = facts.epochs
    if "trainer.max_epochs" in wanted:
        found["trainer.max_epochs"] = epochs, _ = _epochs(facts)
    steps = facts.max_steps if epochs in (None, -1) else epochs * facts.steps_per_epoch
    if facts.max_steps > 0:
        steps = min(steps, facts.max_steps)
    if steps < 1 and {"model.warmup_fraction", "model.ema_decay"} & set(wanted):
        raise UsageError("auto needs a run with an end: set trainer.max_epochs or trainer.max_steps.")
    if "model.warmup_fraction" in wanted:
        found["model.warmup_fraction"] = _warmup(steps)
    if "model.ema_decay" in wanted:
        found["model.ema_decay"] = _ema_decay(steps)
    if "model.base_lr" in wanted:
        found["model.base_lr"] = _base_lr(facts.batch)
    if "model.crop_scale" in wanted:
        found["model.crop_scale"] = _crop_scale(facts)
    return found


def _epochs(facts: Facts) -> tuple[int, str]:
    per_epoch = facts.steps_per_epoch
    each = f"{facts.images} images are {per_epoch} step(s) of {facts.batch}"
    if EPOCHS * per_epoch > STEPS:
        return math.ceil(STEPS / per_epoch), f"{each}; the published {STEPS:,} steps"
    if EPOCHS * per_epoch < FEWEST_STEPS:
        return math.ceil(FEWEST_STEPS / per_epoch), f"{each}; at least {FEWEST_STEPS:,} steps"
    return EPOCHS, f"{each}; the published epochs, {EPOCHS * per_epoch:,} steps"


def _warmup(steps: int) -> tuple[float, str]:
    if WARMUP * steps >= WARMUP_STEPS:
        return WARMUP, f"the published part of {steps:,} steps"
    if LONGEST_WARMUP * steps <= WARMUP_STEPS:
        return LONGEST_WARMUP, f"of {steps:,} steps, which are few; no more than a tenth"
    return float(f"{WARMUP_STEPS / steps:.3g}"), f"{WARMUP_STEPS} of {steps:,} steps"


def _ema_decay(steps: int) -> tuple[float, str]:
    if steps >= 50_000:
        return 0.9999, f"published; it averages the last {10_000:,} of {steps:,} steps"
    decay = max(0.0, float(f"{1 - 5 / steps:.5f}"))
    return decay, f"it averages the last {steps / 5:.0f} of {steps:,} steps, a fifth of them"


def _base_lr(batch: int) -> tuple[float, str]:
    lr = BASE_LR * BATCH / 256 * math.sqrt(batch / BATCH)
    base, published = float(f"{lr * 256 / batch:.3g}"), BASE_LR * BATCH / 256
    return base, (
        f"a learning rate of {base * batch / 256:.3g} for steps of {batch}: the published {published:.2g} at {BATCH}, "
        f"scaled by the root of the batch as AdamW's noise asks (arXiv 2205.10287)"
    )


def _crop_scale(facts: Facts) -> tuple[list[float], str]:
    if facts.side is None:
        raise UsageError("model.crop_scale: auto needs images that can be looked at: set it for shards and sequences.")
    part = (facts.img_size / 2 / facts.side) ** 2
    least = float(f"{min(0.5, max(MIN_CROP, part)):.2g}")
    if least == MIN_CROP:
        return [least, 1.0], f"published; images are about {facts.side:.0f} pixels a side"
    times = facts.img_size / math.sqrt(least) / facts.side
    return [least, 1.0], (
        f"images are about {facts.side:.0f} pixels a side, and a smaller crop would be drawn up to {facts.img_size} by "
        f"more than {times:.2g} times"
    )


#: The options that may be ``auto``.
OPTIONS = ("trainer.max_epochs", "model.warmup_fraction", "model.ema_decay", "model.base_lr", "model.crop_scale")


@contextmanager
def without_auto(args: list[str]) -> Iterator[tuple[list[str], list[str]]]:
    """Take ``auto`` out of a command line whose configs stand first as ``--config=FILE``.

    Args:
        args: As :func:`~nepa_plugin.training.configs.merged_configs` gives it.

    Yields:
        The command line without, and the options that were ``auto`` where they were named last.

    Raises:
        UsageError: If another option is ``auto`` that has no such value.
    """
    state: dict[str, bool] = {}
    kept: list[str] = []
    with tempfile.TemporaryDirectory(prefix="nepa-config-") as folder:
        left = iter(args)
        for arg in left:
            option, equals, value = arg.partition("=")
            if option in ("--config", "-c") and equals:
                config = read_config(value)
                if _strip(config, "", state):
                    path = Path(folder) / str(len(kept)) / Path(value).name
                    path.parent.mkdir()
                    path.write_text(yaml.safe_dump(config, sort_keys=False))
                    arg = f"{option}={path}"
                kept.append(arg)
                continue
            name = _plain(option.removeprefix("--"))
            if not option.startswith("--") or name not in OPTIONS:
                kept.append(arg)
                continue
            given = value if equals else next(left, None)
            state[name] = given == AUTO
            if given != AUTO:
                kept += [arg] if equals or given is None else [arg, given]
        yield kept, [name for name in OPTIONS if state.get(name)]


def _plain(name: str) -> str:
    return name.replace("model.init_args.", "model.")


def _strip(config: dict[str, Any], prefix: str, state: dict[str, bool]) -> bool:
    """Take every ``auto`` out of a mapping, note which options it gives, and return whether there was any."""
    found = False
    for key, value in list(config.items()):
        name = _plain(f"{prefix}{key}")
        if isinstance(value, dict):
            found |= _strip(value, f"{prefix}{key}.", state)
        elif name in OPTIONS:
            state[name] = value == AUTO
            if value == AUTO:
                del config[key]
                found = True
    return found


def _side(images: Any, index: int) -> float | None:
    """Return the root of an image's number of pixels; nothing for a file that is no image, which the check names."""
    try:
        return math.sqrt(math.prod(images[index][0].size))
    except IMAGE_ERRORS:
        return None


def look_at(config: Any, wanted: list[str], devices: int) -> Facts:
    """Return what the numbers follow from, of a parsed config.

    Args:
        config: The command's, without what is ``auto``.
        wanted: The options that are.
        devices: On all machines.
    """
    data = ImageData(**config.data.as_dict())
    stored = images = len(data.train_shards or data.train_images or ())
    batch = config.global_batch_size
    if batch is None:
        batch = config.data.batch_size_per_device * devices * config.trainer.accumulate_grad_batches
    limit = config.trainer.limit_train_batches
    if isinstance(limit, int):
        images = min(images, limit * config.data.batch_size_per_device * devices)
    elif limit is not None:
        images = int(images * limit)
    side = None
    if "model.crop_scale" in wanted and data.train_shards is None and data.sequences is None:
        sides = [side for i in spread(stored, LOOKED_AT) if (side := _side(data.train_images, i)) is not None]
        side = median(sides) if sides else None
    epochs = None if "trainer.max_epochs" in wanted else config.trainer.max_epochs
    return Facts(images, batch, config.model.init_args.img_size, side, epochs, config.trainer.max_steps)
