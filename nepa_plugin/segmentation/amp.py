"""Mixed precision where there is a GPU to profit from it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Trains in bfloat16 autocast on CUDA and in float32 elsewhere.

    mmengine's ``AmpOptimWrapper`` scales the loss, which only float16 needs: its scaler waits for the device in every
    step, and leaves out steps whose gradient is not finite without a word. Arguments are those of mmengine's
    ``OptimWrapper``.
    """

    #: Kinds of devices that train in bfloat16.
    DEVICES = frozenset({"cuda"})

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Set the precision of the forward pass, and what mmengine sets for accumulated gradients."""
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, torch.bfloat16, enabled=device in self.DEVICES):
            yield

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the optimizer's state, also from a checkpoint that has a loss scaler's."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "loss_scaler"})
