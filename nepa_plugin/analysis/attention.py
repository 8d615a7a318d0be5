"""What attends to what: attention probabilities of chosen layers, rollout, and what they say in numbers."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from nepa_plugin.analysis.modes import evaluating


def check_layers(model: Any, layers: Sequence[int]) -> None:
    """Raise ``ValueError`` if a model has not all of these layers, counted from 1."""
    depth = len(model.blocks)
    if odd := [layer for layer in layers if not 1 <= layer <= depth]:
        raise ValueError(f"Layers {odd} are not in 1..{depth}.")


def check_heads(model: Any, heads: Sequence[int]) -> None:
    """Raise ``ValueError`` if a model's attention has not all of these heads, counted from 1."""
    number = model.blocks[0].attn.num_heads
    if odd := [head for head in heads if not 1 <= head <= number]:
        raise ValueError(f"Heads {odd} are not in 1..{number}.")


@contextmanager
def _kept(model: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Fill a dictionary with the attention probabilities of layers whenever the model runs."""
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, probabilities: Tensor) -> None:
            found[layer] = probabilities

        return hook

    attentions = {layer: model.blocks[layer - 1].attn for layer in layers}
    fused = {layer: attention.fused_attn for layer, attention in attentions.items()}
    hooks = [attention.attn_drop.register_forward_hook(keep(layer)) for layer, attention in attentions.items()]
    try:
        for attention in attentions.values():
            attention.fused_attn = False  # timm then makes the matrix, which the fused kernel never has
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        for layer, attention in attentions.items():
            attention.fused_attn = fused[layer]


@torch.inference_mode()
def attention_probabilities(model: Any, images: Tensor, layers: Sequence[int] | None = None) -> dict[int, Tensor]:
    """Return the attention probabilities of layers; nothing is computed for the others.

    Args:
        model: A Vision Transformer of timm, such as NEPA's predictor.
        images: Normalised images (B, C, H, W).
        layers: From 1 to the model's depth; by default all.

    Returns:
        By layer (B, heads, T, T): a row per token that attends, the class token first, then the patches in raster
        order, in whatever order they are read.

    Raises:
        ValueError: If there is no such layer.
    """
    layers = range(1, len(model.blocks) + 1) if layers is None else layers
    check_layers(model, layers)
    with evaluating(model), _kept(model, layers) as found:
        model.forward_features(images)
    return {layer: found[layer].float() for layer in layers}


def rollout(probabilities: Sequence[Tensor]) -> Tensor:
    """Return how much each token's output depends on each input token, by following attention from layer to layer.

    Half of a layer's output is taken to come through its attention, averaged over the heads, and half past it. Source:
    Abnar and Zuidema, Quantifying attention flow in transformers, arXiv 2005.00928.

    Args:
        probabilities: Of the layers from the first on, (B, heads, T, T) each.

    Returns:
        (B, T, T), of which every row has the sum 1.
    """
    first = probabilities[0]
    result = torch.eye(first.shape[-1], device=first.device).expand(first.shape[0], -1, -1)
    for layer in probabilities:
        mixed = (layer.mean(dim=1) + torch.eye(layer.shape[-1], device=layer.device)) / 2
        result = mixed @ result
    return result


@dataclass(frozen=True)
class AttentionStatistics:
    """What a layer's attention is like, by head, averaged over the patches that attend and over the images.

    Attributes:
        distance: Mean distance of what a patch attends to, in patches, of the attention that goes to patches (H,).
        entropy: Entropy of a patch's attention over all tokens, in nats (H,).
        outside: Part of the attention to patches that goes outside of the 3x3 patches around the one that attends (H,).
    """

    distance: Tensor
    entropy: Tensor
    outside: Tensor


def attention_statistics(probabilities: Tensor, grid: tuple[int, int], prefix: int) -> AttentionStatistics:
    """Return how far, how widely and how locally a layer attends.

    Args:
        probabilities: (B, heads, T, T), from :func:`attention_probabilities`.
        grid: (rows, columns) of the patches.
        prefix: Tokens before the patches.
    """
    rows, columns = grid
    index = torch.arange(rows * columns, device=probabilities.device)
    places = torch.stack([index // columns, index % columns], dim=-1).float()
    apart = (places[:, None] - places[None, :]).abs()
    from_patches = probabilities[:, :, prefix:]
    among = from_patches[..., prefix:]
    # a patch that attends to the class token alone is no distance away
    among = among / among.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(among.dtype).tiny)
    mean = (0, 2)
    return AttentionStatistics(
        distance=(among * apart.square().sum(dim=-1).sqrt()).sum(dim=-1).mean(dim=mean),
        entropy=torch.special.entr(from_patches).sum(dim=-1).mean(dim=mean),
        outside=(among * (apart.amax(dim=-1) > 1)).sum(dim=-1).mean(dim=mean),
    )


def mean_statistics(model: Any, images: Iterable[Tensor]) -> dict[int, AttentionStatistics]:
    """Return the statistics of every layer of a model, averaged over images.

    Args:
        model: A Vision Transformer of timm.
        images: Normalised, (C, H, W) each; one at a time, as the matrices of all layers of a ViT-B are 38 MB.
    """
    found: dict[int, list[AttentionStatistics]] = {}
    for image in images:
        grid = model.patch_embed.dynamic_feat_size((image.shape[-2], image.shape[-1]))
        for layer, probabilities in attention_probabilities(model, image[None]).items():
            statistics = attention_statistics(probabilities, grid, model.num_prefix_tokens)
            found.setdefault(layer, []).append(statistics)
    kinds = [each.name for each in fields(AttentionStatistics)]
    return {
        layer: AttentionStatistics(*(torch.stack([getattr(each, kind) for each in own]).mean(dim=0) for kind in kinds))
        for layer, own in found.items()
    }


def uniform_statistics(grid: tuple[int, int], prefix: int, order: Sequence[int] | None) -> dict[str, float]:
    """Return the statistics of attention that treats all tokens alike that it may see, to compare with.

    Args:
        grid: (rows, columns) of the patches.
        prefix: Tokens before the patches.
        order: In which patches are read under a causal mask; nothing for bidirectional attention.
    """
    from nepa_plugin.order import seen_mask

    tokens = prefix + math.prod(grid)
    seen = torch.ones(tokens, tokens) if order is None else seen_mask(torch.tensor(order), prefix).float()
    found = attention_statistics((seen / seen.sum(dim=-1, keepdim=True))[None, None], grid, prefix)
    return {name: float(value[0]) for name, value in vars(found).items()}
