"""Parameter groups and learning rates of fine-tuning, by layer."""

import math
import re
from typing import Any

from torch import nn

from nepa_plugin.finetuning.recipe import Recipe


def layer_scale(name: str, depth: int, decay: float) -> float | None:
    """Return the learning-rate factor of a parameter: decay^(L - 1 - i) in block i, decay^L before the blocks.

    It is 1 for the norm between pooling and head, and ``None`` for the final norm and the head, which have a learning
    rate of their own.
    """
    name = name.removeprefix("backbone.")
    if match := re.match(r"blocks\.(\d+)\.", name):
        return float(decay ** (depth - 1 - int(match[1])))
    if name.startswith("fc_norm."):
        return 1.0
    return None if re.match(r"(norm|head)\.", name) else float(decay**depth)


def parameter_groups(network: nn.Module, depth: int, lr: float, recipe: Recipe) -> list[dict[str, Any]]:
    """Return AdamW groups by layer and kind of parameter.

    Args:
        network: What is trained.
        depth: Number of its blocks.
        lr: Learning rate of the last block.
        recipe: Layer decay, weight decay and the head's learning rate.

    Returns:
        Groups with ``lr``, ``weight_decay``, and ``lr_scale``, by which the layer-wise warm-up goes.
    """
    groups: dict[tuple[float | None, bool], dict[str, Any]] = {}
    head_lr = lr if recipe.head_lr is None else recipe.head_lr
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        scale, matrix = layer_scale(name, depth, recipe.layer_decay), parameter.ndim > 1
        group = {
            "params": [],
            "lr": head_lr if scale is None else lr * scale,
            "weight_decay": recipe.weight_decay if matrix else 0.0,
            "lr_scale": 1.0 if scale is None else scale,
            "head": scale is None,
        }
        groups.setdefault((scale, matrix), group)["params"].append(parameter)
    return list(groups.values())


def lr_factor(step: int, steps: int, warmup: float) -> float:
    """Return linear warm-up over at least one step, then cosine to zero at the last."""
    warmup = max(1.0, warmup)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, steps - warmup))))
