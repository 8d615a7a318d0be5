"""The names of a classifier's classes, where timm keeps them: ``model.pretrained_cfg["label_names"]``."""

from collections.abc import Sequence
from typing import Any

from torch import nn


def class_names(model: nn.Module) -> list[str] | None:
    """Return the names of a classifier's classes in the order of its logits, or ``None`` where it has none."""
    names: Any = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    if isinstance(names, dict):  # timm: by number, as text where they come from a file
        names = [names.get(i, names.get(str(i))) for i in range(len(names))]
    if not isinstance(names, (list, tuple)) or len(names) != getattr(model, "num_classes", 0):
        return None
    return [str(name) for name in names]


def name_classes(model: nn.Module, names: Sequence[str]) -> None:
    """Give a classifier's classes names, which its exported folder holds.

    Args:
        model: Built by timm's name, with one logit per class.
        names: One for each class; ImageNet's, for one, are not all different.

    Raises:
        ValueError: If their number is not that of the classes.
    """
    num_classes: Any = getattr(model, "num_classes", 0)
    if len(names) != num_classes:
        raise ValueError(f"{len(names)} names for {num_classes} classes.")
    config: Any = model.pretrained_cfg
    config["num_classes"] = num_classes  # timm drops the names of another number of classes
    config["label_names"] = list(names)
