"""Rolling forward: a predictor that reads its own predictions, with the keys and values of what it has read kept."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor

from nepa_plugin.analysis.modes import evaluating
from nepa_plugin.order import in_order, patch_order
from nepa_plugin.predictor import NepaViT


class CachedPredictor:
    """A predictor in evaluation mode that reads embeddings a few at a time.

    Every layer keeps the keys and values of what was read, so that one more embedding costs one token's arithmetic and
    not that of all before it. The outputs are those of :meth:`~nepa_plugin.predictor.NepaViT.predict_next`.

    Args:
        model: The predictor, with causal attention; its weights are shared.
        batch: Number of images.
        grid: (rows, columns) of patches; by default the model's own.

    Raises:
        ValueError: If attention is not causal: what was read would then depend on what comes.
    """

    def __init__(self, model: NepaViT, batch: int, grid: tuple[int, int] | None = None) -> None:
        if not model.is_causal:
            raise ValueError("Only causal attention can be rolled forward: model.set_attention('causal').")
        self.model: Any = model
        self.grid = grid or tuple(model.patch_embed.grid_size)
        rows, columns = self.grid
        weight = model.patch_embed.proj.weight
        order = torch.tensor(patch_order(model.order, rows, columns), device=weight.device)
        self.rope = in_order(model.rope.get_embed(shape=[rows, columns]), order) if model.rope is not None else None
        self.places = self._places(order)
        self.prefix = model.num_prefix_tokens
        heads = self.model.blocks[0].attn.num_heads
        shape = batch, heads, self.prefix + rows * columns, model.embed_dim // heads
        self.kept = [(weight.new_empty(shape), weight.new_empty(shape)) for _ in self.model.blocks]
        self.length = 0

    def _places(self, order: Tensor) -> Tensor | None:
        """Return what is added to the embeddings, (T, D) in the order in which they are read, if anything is."""
        places, prefix = self.model.pos_embed, self.model.num_prefix_tokens
        if places is None:
            return None
        if tuple(self.grid) != tuple(self.model.patch_embed.grid_size):
            raise ValueError(f"Absolute positions are those of {self.model.patch_embed.grid_size}, not of {self.grid}.")
        if self.model.no_embed_class:
            places = F.pad(places, (0, 0, prefix, 0))
        ordered: Tensor = torch.cat([places[0, :prefix], places[0, prefix:][order]])
        return ordered

    @torch.inference_mode()
    def read(self, embeddings: Tensor) -> Tensor:
        """Read further embeddings, the class token first of all, and return the predictions of what follows each.

        Args:
            embeddings: (B, S, D) in the order in which they are read.

        Returns:
            Predictions (B, S, D).

        Raises:
            ValueError: If there are more than the grid has.
        """
        start, end = self.length, self.length + embeddings.shape[1]
        if end > self.kept[0][0].shape[2]:
            raise ValueError(f"{end} tokens are more than {self.prefix} and {self.grid[0]} x {self.grid[1]} patches.")
        x = embeddings if self.places is None else embeddings + self.places[start:end]
        x = self.model.norm_pre(x)
        mask = None
        if start and end - start > 1:
            mask = torch.ones(end - start, end, dtype=torch.bool, device=x.device).tril(start)
        for block, kept in zip(self.model.blocks, self.kept, strict=True):
            mixed = self._attend(block.attn, block.norm1(x), kept, start, end, mask)
            x = x + (mixed if block.gamma_1 is None else block.gamma_1 * mixed)
            hidden = block.mlp(block.norm2(x))
            x = x + (hidden if block.gamma_2 is None else block.gamma_2 * hidden)
        self.length = end
        predictions: Tensor = self.model.norm(x)
        return predictions

    def _attend(
        self, attention: Any, x: Tensor, kept: tuple[Tensor, Tensor], start: int, end: int, mask: Tensor | None
    ) -> Tensor:
        batch, tokens, width = x.shape
        query, key, value = (
            attention.qkv(x).reshape(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        )
        query, key = self._turned(attention.q_norm(query), start, end), self._turned(attention.k_norm(key), start, end)
        keys, values = kept
        keys[:, :, start:end], values[:, :, start:end] = key, value
        mixed = F.scaled_dot_product_attention(
            query.type_as(value), keys[:, :, :end], values[:, :, :end], attn_mask=mask, is_causal=not start
        )
        mixed = attention.norm(mixed.transpose(1, 2).reshape(batch, tokens, width))
        projected: Tensor = attention.proj(mixed)
        return projected

    def _turned(self, x: Tensor, start: int, end: int) -> Tensor:
        """Return queries or keys (B, heads, S, d) rotated by their positions; the class token has none."""
        if self.rope is None:
            return x
        plain = max(0, min(self.prefix, end) - start)
        table = self.rope[max(0, start - self.prefix) : max(0, end - self.prefix)]
        turned = apply_rot_embed_cat(x[:, :, plain:], table, half=True)
        return torch.cat([x[:, :, :plain], turned], dim=2).type_as(x)


@dataclass(frozen=True)
class Rollout:
    """What a predictor imagines after the first patches of images. All in the order in which patches are read.

    Attributes:
        known: Patches that were given.
        own: The embeddings of the images' patches (B, N, D).
        rolled: The same for the given patches; from there on the predictions that were read in their place (B, N, D),
            each as long as the given embeddings are on average: the loss is a cosine and says nothing of lengths.
        one_step: Predictions from the images' own patches before each (B, N, D).
    """

    known: int
    own: Tensor
    rolled: Tensor
    one_step: Tensor

    def similarity(self) -> dict[str, Tensor]:
        """Return cosines to the images' own embeddings, averaged over the images, of the patches after those given.

        Returns:
            ``rolled``, ``one step``, and ``copy`` of the last given patch, each (N - known,).
        """
        target = self.own[:, self.known :]
        candidates = {
            "rolled": self.rolled[:, self.known :],
            "one step": self.one_step[:, self.known :],
            "copy": self.own[:, self.known - 1 : self.known].expand_as(target),
        }
        return {name: F.cosine_similarity(each, target, dim=-1).mean(dim=0) for name, each in candidates.items()}


@torch.inference_mode()
def roll_forward(model: NepaViT, images: Tensor, known: int) -> Rollout:
    """Give a predictor the first patches of images, and let it read its own predictions from there on.

    Args:
        model: The predictor, with causal attention.
        images: Normalised images (B, C, H, W).
        known: Patches that are given, from 1 to all but one.

    Raises:
        ValueError: If there are not so many, or attention is not causal.
    """
    model.check_predicts()
    with evaluating(model):
        embeddings, predictions = model.predict_next(images)
        prefix, patches = model.num_prefix_tokens, embeddings.shape[1] - model.num_prefix_tokens
        if not 1 <= known < patches:
            raise ValueError(f"{known} known patches: give 1 to {patches - 1}.")
        grid = model.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
        reader = CachedPredictor(model, len(images), grid)
        given = embeddings[:, prefix : prefix + known]
        length = given.norm(dim=-1).mean(dim=1)[:, None, None]
        expected = reader.read(embeddings[:, : prefix + known])[:, -1:]
        rolled = [given]
        for _ in range(patches - known):
            rolled.append(F.normalize(expected, dim=-1) * length)
            if reader.length < prefix + patches:
                expected = reader.read(rolled[-1])
    return Rollout(known, embeddings[:, prefix:], torch.cat(rolled, dim=1), predictions[:, prefix - 1 : -1])
