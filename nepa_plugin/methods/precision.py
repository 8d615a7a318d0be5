"""Losses in float32, whatever precision the network runs in."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


def in_float32(loss: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a loss with autocast off and every floating-point tensor in float32.

    Under autocast a matrix product of a loss would round its similarities or logits to bfloat16's 8 bits, before a
    temperature of 0.04 multiplies what was lost, and so would its gradient.

    Args:
        loss: The criterion, or any function of tensors.
        *args: Its arguments; tensors may be inside of lists and tuples.
        **kwargs: Its keyword arguments.

    Returns:
        What it returns.
    """
    args, kwargs = tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, (args, kwargs))
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    with torch.autocast(device_type=tensors[0].device.type, enabled=False):
        return loss(*args, **kwargs)
