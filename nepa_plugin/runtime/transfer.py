"""From the host to the device, without waiting for what the device still has to do."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor that was made on the CPU; the host goes on at once.

    From pageable memory a copy to CUDA waits until all work before it is done, so it goes through pinned memory.

    Args:
        tensor: On the CPU; one that is on the device already is returned as it is.
        device: Where it is wanted.

    Returns:
        The copy.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
