"""NEPA's training step as one would write it from the paper: every product a tensor of its own, no fused kernel."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, normalize

from nepa_plugin.predictor import NepaViT


class WrittenOut(nn.Module):
    """Loss of a NEPA predictor in plain PyTorch: what :mod:`nepa_plugin.speed` compares our step with.

    Query, key and value are three products, the attention matrix is made, masked and normalised, both sides of the loss
    are normalised as tensors. The values and gradients are those of ``NEPA``.

    Args:
        model: A predictor with a GELU MLP, without dropout and stochastic depth; its weights are shared.
    """

    def __init__(self, model: NepaViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return the loss of images (B, C, H, W)."""
        model: Any = self.model
        patches = model.patch_embed(images)
        z = torch.cat([model.cls_token.expand(len(images), -1, -1), patches], dim=1)
        sine, cosine = model.rope.get_embed().chunk(2, dim=-1)
        mask = None
        if model.is_causal:
            mask = torch.ones(z.shape[1], z.shape[1], dtype=torch.bool, device=z.device).triu(1)
        x = z
        for block in model.blocks:
            x = x + block.gamma_1 * self._attention(block.attn, _norm(block.norm1, x), sine, cosine, mask)
            hidden = gelu(linear(_norm(block.norm2, x), block.mlp.fc1.weight, block.mlp.fc1.bias))
            x = x + block.gamma_2 * linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)
        predictions = normalize(_norm(model.norm, x).float()[:, :-1], dim=-1)
        targets = normalize(z.detach().float()[:, 1:], dim=-1)
        return -(predictions * targets).sum(dim=-1).mean()

    def _attention(self, layer: Any, x: Tensor, sine: Tensor, cosine: Tensor, mask: Tensor | None) -> Tensor:
        batch, tokens, width = x.shape
        query, key, value = (
            linear(x, weight, bias).view(batch, tokens, layer.num_heads, -1).transpose(1, 2)
            for weight, bias in zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3), strict=True)
        )
        query, key = (_rotated(_norm(n, y), sine, cosine) for n, y in ((layer.q_norm, query), (layer.k_norm, key)))
        scores = query.type_as(value) @ key.type_as(value).transpose(-2, -1) * layer.scale
        if mask is not None:
            scores = scores.masked_fill(mask, -torch.inf)
        mixed = scores.softmax(dim=-1).type_as(value) @ value
        return linear(mixed.transpose(1, 2).reshape(batch, tokens, width), layer.proj.weight, layer.proj.bias)


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _rotated(x: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    """Return queries or keys (B, heads, T, d) with all but the class token's rotated."""
    patches = x[:, :, 1:]
    first, second = patches.chunk(2, dim=-1)
    turned = patches * cosine + torch.cat([-second, first], dim=-1) * sine
    return torch.cat([x[:, :, :1], turned], dim=2)
