"""Pooled features of a frozen backbone at every depth, in one pass over the images."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

POOLS = ("last", "mean")


@dataclass
class DepthFeatures:
    """Features by depth and pooling, and the labels.

    Attributes:
        features: depth -> pooling -> (N, D), float32 on the CPU. Depths are ``embedding``, ``block 1`` ... ``block L``
            and ``final norm``; poolings are ``last`` (the last token) and ``mean`` (of the patch tokens).
        labels: Class indices (N,).
    """

    features: dict[str, dict[str, Tensor]]
    labels: Tensor


def depth_names(model: nn.Module) -> list[str]:
    """Return the names of a transformer's depths, from the input embedding to the final norm."""
    return ["embedding", *(f"block {i + 1}" for i in range(len(model.blocks))), "final norm"]  # type: ignore[arg-type]


@torch.no_grad()
def extract_depth_features(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor, Any]], device: str | torch.device = "cpu"
) -> DepthFeatures:
    """Run images through a frozen transformer and pool the tokens at every depth.

    Args:
        model: A timm ViT with ``blocks``, ``norm`` and ``num_prefix_tokens``. Its weights are not changed.
        batches: Yields (images (B, C, H, W), labels (B,), filenames).
        device: Where to run.

    Returns:
        The features of all images, in the order in which they came.
    """
    names = depth_names(model)
    states: dict[str, Tensor] = {}
    blocks: Any = model.blocks

    def keep(name: str) -> Any:
        return lambda module, args, output: states.__setitem__(name, output)

    hooks = [blocks[0].register_forward_pre_hook(lambda module, args: states.__setitem__("embedding", args[0]))]
    hooks += [block.register_forward_hook(keep(f"block {i + 1}")) for i, block in enumerate(blocks)]
    hooks.append(model.norm.register_forward_hook(keep("final norm")))  # type: ignore[union-attr]
    modes, prefix = [(m, m.training) for m in model.modules()], int(model.num_prefix_tokens)  # type: ignore[arg-type]
    pooled: dict[str, dict[str, list[Tensor]]] = {name: {pool: [] for pool in POOLS} for name in names}
    labels = []
    model.eval().to(device)
    try:
        for images, targets, *_ in batches:
            model.forward_features(images.to(device))  # type: ignore[operator]
            for name in names:
                pooled[name]["last"].append(states[name][:, -1].float().cpu())
                pooled[name]["mean"].append(states[name][:, prefix:].float().mean(dim=1).cpu())
            labels.append(targets)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    if not labels:
        raise ValueError("There are no images to extract features from.")
    return DepthFeatures({n: {p: torch.cat(v) for p, v in by.items()} for n, by in pooled.items()}, torch.cat(labels))
