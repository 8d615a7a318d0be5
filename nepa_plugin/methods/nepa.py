"""NEPA: predict the next patch's embedding under a causal mask (arXiv 2512.16922)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nepa_plugin.analysis.collapse import effective_rank, mean_pairwise_cosine
from nepa_plugin.data.transforms import NEPATransform
from nepa_plugin.loss import ContrastiveNextEmbeddingLoss, NextEmbeddingLoss
from nepa_plugin.methods.causal import CausalMethod
from nepa_plugin.methods.heads import HeadKind, TokenHeads
from nepa_plugin.methods.masks import RandomMasks
from nepa_plugin.runtime.ranges import FractionBelowOne, NonNegativeFloat, PositiveFloat, PositiveInt


class NEPA(CausalMethod):
    """Next-Embedding Predictive Autoregression with the published recipe as defaults.

    A drop-in for lightly's benchmark harness: ``NEPA(batch_size_per_device=..., num_classes=...)`` with the
    module-level ``transform``. Source: arXiv 2512.16922, ImageNet-1K pretraining.

    Args:
        shift: Predict the next embedding; ``False`` predicts the same one (an ablation).
        stop_gradient: Detach the targets; ``False`` lets them collapse (an ablation).
        predictor_head: A network between the transformer's outputs and the loss, which is thrown away after
            pretraining: ``"mlp"``, ``"simsiam"`` (:class:`~nepa_plugin.methods.heads.TokenHeads`), or ``"none"``, as
            published.
        horizon: Places ahead that are predicted, each by a linear layer of its own on the head's hidden layers, and the
            loss is their mean; without ``predictor_head`` the first reads the transformer's outputs as they are, as
            published, and the others have a linear layer.
        horizon_weights: Of each place ahead in that mean; by default all alike.
        loss: ``"cosine"``, as published, or ``"infonce"``
            (:class:`~nepa_plugin.loss.ContrastiveNextEmbeddingLoss`).
        temperature: Of ``infonce``.
        class_token_target: Let the class token's output predict the first patch, as published.
        input_mask_ratio: Fraction of the patches that the transformer sees a mask token in place of; what is predicted
            stays as it is (an ablation of the paper).
        **kwargs: Arguments of :class:`~nepa_plugin.methods.causal.CausalMethod`.

    Raises:
        ValueError: If the backbone is not a ``nepa_vit_*`` model, sizes do not fit, or options do not go together.
    """

    title = "NEPA"
    takes_sequences = takes_native_sizes = takes_orders = True
    #: Tokens among which the collapse diagnostics are computed.
    DIAGNOSTIC_TOKENS = 1024

    def __init__(
        self,
        *args: Any,
        shift: bool = True,
        stop_gradient: bool = True,
        predictor_head: HeadKind = "none",
        horizon: PositiveInt = 1,
        horizon_weights: list[NonNegativeFloat] | None = None,
        loss: Literal["cosine", "infonce"] = "cosine",
        temperature: PositiveFloat = 0.1,
        class_token_target: bool = True,
        input_mask_ratio: FractionBelowOne = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if loss not in ("cosine", "infonce"):
            raise ValueError(f"loss={loss!r} is neither 'cosine' nor 'infonce'.")
        if predictor_head == "simsiam" and hasattr(self.backbone, "input_dim"):
            raise ValueError("predictor_head='simsiam' has a BatchNorm, which would count padding: take 'mlp'.")
        if horizon_weights is not None and (len(horizon_weights) != horizon or not sum(horizon_weights)):
            raise ValueError(f"horizon_weights={horizon_weights} must be {horizon} number(s), not all of them 0.")
        if horizon > 1 and not shift:
            raise ValueError(f"horizon={horizon} needs shift: without, a prediction is compared with its own place.")
        tokens = self.backbone.patch_embed.num_patches + class_token_target * self.backbone.num_prefix_tokens
        if not hasattr(self.backbone, "input_dim") and horizon >= tokens:
            raise ValueError(f"horizon={horizon} must be less than the {tokens} tokens of an image.")
        self.criterion = (
            NextEmbeddingLoss(shift, stop_gradient)
            if loss == "cosine"
            else ContrastiveNextEmbeddingLoss(shift, stop_gradient, temperature)
        )
        self.horizon_weights = horizon_weights
        self.class_token_target = class_token_target
        self.backbone.set_predicts(predictor_head == "none")
        dim = self.backbone.embed_dim
        self.mask_token: nn.Parameter | None = None
        if input_mask_ratio:
            patches = self.backbone.patch_embed.num_patches
            if hasattr(self.backbone, "input_dim") or not int(input_mask_ratio * patches):
                raise ValueError(f"input_mask_ratio={input_mask_ratio} masks none of an image's patches: raise it.")
            self.masks = RandomMasks(patches, int(input_mask_ratio * patches))
            self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
            nn.init.trunc_normal_(self.mask_token, std=0.02)
        #: What is between the transformer's outputs and the loss.
        self.heads = TokenHeads(predictor_head, dim, horizon)

    def step(self, views: list[Tensor], masks: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return the next-embedding loss of the one view, and its features (B, D).

        Args:
            views: Images (B, C, H, W), or sequences (B, T, input_dim) for a backbone that takes them.
            masks: Of sequences that are padded, their lengths (B,); with ``input_mask_ratio``, which patches of images
                are masked (B, N).
        """
        padding = valid = None
        if self.mask_token is not None:
            (masked,) = self.drawn_masks(views[0], masks)
            embeddings, outputs = self.backbone.predict_next(views[0], masked=masked, mask_token=self.mask_token)
        elif masks:
            padding = torch.arange(views[0].shape[1], device=views[0].device) >= masks[0][:, None]
            valid = self.backbone.valid(padding)
            embeddings, outputs = self.backbone.predict_next(views[0], padding=padding)
        else:
            embeddings, outputs = self.backbone.predict_next(views[0])
        prefix = self.backbone.num_prefix_tokens
        if self.is_logging_step:
            patches = embeddings[:, prefix:]
            self._log_collapse(patches.flatten(0, 1) if padding is None else patches[~padding])
        first = 0 if self.class_token_target else prefix
        seen, targets = outputs[:, first:], embeddings[:, first:]
        valid = valid if valid is None else valid[:, first:]
        predictions = self.heads(seen)
        losses = [self.criterion(targets, found, valid, ahead + 1) for ahead, found in enumerate(predictions)]
        if len(losses) == 1:
            loss = losses[0]
        else:
            weights = self.horizon_weights or [1.0] * len(losses)
            weighted = [weight * each for weight, each in zip(weights, losses, strict=True)]
            loss = torch.stack(weighted).sum() / sum(weights)
        if self.is_logging_step and self.criterion.shift:
            self._log_skill(targets, predictions[0], valid)
        if padding is None:
            return loss, self.pooled(outputs)
        there = (~padding)[:, :, None]
        return loss, (outputs[:, prefix:] * there).sum(dim=1) / there.sum(dim=1)

    @torch.no_grad()
    def _log_skill(self, embeddings: Tensor, predictions: Tensor, valid: Tensor | None) -> None:
        """Log the loss of copying each embedding as its successor's prediction, and how much better (B, T, D) are.

        Neighbours look alike, so that a loss near -1 may say little. The skill is 0 for copying and 1 for a perfect
        prediction.
        """
        cosine = NextEmbeddingLoss()
        copying, loss = (
            self.mean_over_devices(cosine(embeddings, found, valid)) for found in (embeddings, predictions)
        )
        self.log("copy_baseline", copying)
        self.log("skill", (copying - loss) / (1 + copying).clamp_min(1e-6))

    @torch.no_grad()
    def _log_collapse(self, tokens: Tensor) -> None:
        """Log how far the patch embeddings (N, D) are from having become one and the same vector."""
        # Strides of a large prime instead of draws: spread over images and positions, and the training step's random
        # numbers are the same whether it logs or not.
        index = torch.arange(min(len(tokens), self.DIAGNOSTIC_TOKENS), device=tokens.device) * 1_000_003 % len(tokens)
        tokens = tokens[index]
        self.log("embedding_cosine", mean_pairwise_cosine(tokens))
        self.log("embedding_effective_rank", effective_rank(tokens))


transform = NEPATransform()
