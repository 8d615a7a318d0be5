"""What a training step of fine-tuning costs, counted in one step of a copy."""

import copy
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nepa_plugin.data.evaluation import image_size


def step_gflops(network: Any) -> float:
    """Return floating-point operations of the forward and backward pass of one image, in 1e9.

    A multiplication and an addition are two; attention is counted in full, also where it is causal.

    Args:
        network: A classifier, with what is frozen frozen; it and the random generators are left as they were.
    """
    with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network = copy.deepcopy(network).cpu().train()
        channels = network.patch_embed.proj.in_channels
        network(torch.zeros(1, channels, *image_size(network))).sum().backward()
    return counter.get_total_flops() / 1e9
