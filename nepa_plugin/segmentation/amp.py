"""Mixed precision where there is a GPU to profit from it."""

from typing import Any

import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
def BFloat16OptimWrapper(**kwargs: Any) -> OptimWrapper:
    """Return an optimizer wrapper that trains in bfloat16 autocast on CUDA and in float32 elsewhere.

    Args:
        **kwargs: Arguments of mmengine's ``OptimWrapper``.

    Returns:
        An ``AmpOptimWrapper`` without loss scaling, which bfloat16 does not need, or an ``OptimWrapper``.
    """
    if torch.cuda.is_available():
        return AmpOptimWrapper(dtype="bfloat16", loss_scale=1.0, **kwargs)
    return OptimWrapper(**kwargs)
