"""NEPA: predict the next patch's embedding under a causal mask (arXiv 2512.16922)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from nepa_plugin.analysis.collapse import effective_rank, mean_pairwise_cosine
from nepa_plugin.data.transforms import NEPATransform
from nepa_plugin.loss import NextEmbeddingLoss
from nepa_plugin.methods.causal import CausalMethod
from nepa_plugin.methods.heads import TokenHead


class NEPA(CausalMethod):
    """Next-Embedding Predictive Autoregression with the published recipe as defaults.

    A drop-in for lightly's benchmark harness: ``NEPA(batch_size_per_device=..., num_classes=...)`` with the
    module-level ``transform``. Source: arXiv 2512.16922, ImageNet-1K pretraining.

    Args:
        shift: Predict the next embedding; ``False`` predicts the same one (an ablation).
        stop_gradient: Detach the targets; ``False`` lets them collapse (an ablation).
        predictor_head: A network between the transformer's outputs and the loss, which is thrown away after
            pretraining: ``"mlp"``, ``"simsiam"`` (:class:`~nepa_plugin.methods.heads.TokenHead`), or ``"none"``, as
            published.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.causal.CausalMethod`.

    Raises:
        ValueError: If the backbone is not a ``nepa_vit_*`` model, or sizes do not fit.
    """

    title = "NEPA"
    takes_sequences = True
    #: Tokens among which the collapse diagnostics are computed.
    DIAGNOSTIC_TOKENS = 1024

    def __init__(
        self,
        *args: Any,
        shift: bool = True,
        stop_gradient: bool = True,
        predictor_head: Literal["none", "mlp", "simsiam"] = "none",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.criterion = NextEmbeddingLoss(shift=shift, stop_gradient=stop_gradient)
        self.predictor_head = None if predictor_head == "none" else TokenHead(predictor_head, self.backbone.embed_dim)

    def step(self, views: list[Tensor], masks: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """Return the next-embedding loss of the one view, and its features (B, D).

        Args:
            views: Images (B, C, H, W), or sequences (B, T, input_dim) for a backbone that takes them.
            masks: Of sequences that are padded, their lengths (B,).
        """
        padding = valid = None
        if masks:
            padding = torch.arange(views[0].shape[1], device=views[0].device) >= masks[0][:, None]
            valid = self.backbone.valid(padding)
            embeddings, outputs = self.backbone.predict_next(views[0], padding=padding)
        else:
            embeddings, outputs = self.backbone.predict_next(views[0])
        if self.is_logging_step:
            self._log_collapse(embeddings[:, 1:].flatten(0, 1) if padding is None else embeddings[:, 1:][~padding])
        predictions = outputs if self.predictor_head is None else self.predictor_head(outputs)
        loss = self.criterion(embeddings, predictions, valid)
        if self.is_logging_step and self.criterion.shift:
            self._log_skill(embeddings, loss, valid)
        if padding is None:
            return loss, self.pooled(outputs)
        there = (~padding)[:, :, None]
        return loss, (outputs[:, 1:] * there).sum(dim=1) / there.sum(dim=1)

    @torch.no_grad()
    def _log_skill(self, embeddings: Tensor, loss: Tensor, valid: Tensor | None) -> None:
        """Log the loss of copying each embedding (B, T, D) as its successor's prediction, and how much better we are.

        Neighbours look alike, so that a loss near -1 may say little. The skill is 0 for copying and 1 for a perfect
        prediction.
        """
        # past torch.compile, whose graph is that of training
        copying = self.mean_over_devices(NextEmbeddingLoss.forward(self.criterion, embeddings, embeddings, valid))
        self.log("copy_baseline", copying)
        self.log("skill", (copying - self.mean_over_devices(loss)) / (1 + copying).clamp_min(1e-6))

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
