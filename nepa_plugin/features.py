"""One feature per image of a Vision Transformer, read at any depth."""

from typing import Any

import torch
from torch import Tensor

from nepa_plugin.order import PatchOrder


class ImageFeatures(PatchOrder):
    """What :class:`~nepa_plugin.predictor.NepaViT` reads of its tokens; its own class goes on below it."""

    blocks: Any
    cls_token: Any
    best_feature: tuple[str, str]
    embed: Any
    forward_features: Any
    forward_intermediates: Any

    def extract_features(self, images: Tensor, depth: str | None = None, pool: str | None = None) -> Tensor:
        """Return one feature per image.

        What the predictor learned reads best inside of it: its output is trained to look like an input embedding. The
        default is the best depth and pooling where ``load_backbone(..., feature="best")`` has found them, and otherwise
        the mean of the patch tokens after the final norm. For a trained probe of every depth, run ``nepa evaluate
        BACKBONE --data FOLDER --protocol readout``.

        Args:
            images: Normalised images (B, C, H, W).
            depth: ``"embedding"``, ``"block 1"`` ... ``"block L"``, or ``"final norm"``.
            pool: ``"mean"`` of the patch tokens, ``"last"``, ``"class"`` (the class token), or ``"tokens"``, all of
                them.

        Returns:
            Features (B, D), or tokens (B, T, D), class token first.

        Raises:
            ValueError: If there is no such depth or pooling, or the class token is asked for under causal attention,
                where it sees only itself and is the same for every image.
        """
        depth, pool = depth or self.best_feature[0], pool or self.best_feature[1]
        numbers = {f"block {i + 1}": i for i in range(len(self.blocks))}
        if depth not in ("embedding", *numbers, "final norm"):
            raise ValueError(f"depth={depth!r}: choose embedding, block 1 to block {len(self.blocks)}, or final norm.")
        if pool not in ("mean", "last", "class", "tokens"):
            raise ValueError(f"pool={pool!r}: choose mean, last, class or tokens.")
        if pool == "class" and (self.cls_token is None or self.is_causal):
            why = "sees only itself under causal attention" if self.is_causal else "is none in this model"
            raise ValueError(f"pool='class': the class token {why}. Take 'last' or 'mean', or bidirectional attention.")
        if depth == "embedding":
            tokens = self.embed(images)
        elif depth == "final norm":
            tokens = self.forward_features(images)
        else:
            blocks: Any = self.forward_intermediates(
                images,
                [numbers[depth]],
                return_prefix_tokens=True,
                stop_early=True,
                output_fmt="NLC",
                intermediates_only=True,
            )
            patches, prefix = blocks[0]
            tokens = torch.cat([prefix, patches], dim=1)
        if pool == "tokens":
            return tokens
        if pool == "mean":
            return tokens[:, self.num_prefix_tokens :].mean(dim=1)
        return tokens[:, 0] if pool == "class" else self.last_token(tokens)
