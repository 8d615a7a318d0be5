"""The next-embedding loss: negative cosine similarity of each prediction to the next input embedding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NextEmbeddingLoss(nn.Module):
    """Mean negative cosine similarity between predictions and the embeddings they predict.

    Predictions at positions 0..T-2 are compared with the embeddings at 1..T-1; the embeddings are detached. The value
    lies in [-1, 1], -1 being a perfect prediction. Source: NEPA, arXiv 2512.16922, algorithm 1.

    Neither side is normalised as a tensor: the dot products and both norms are reductions to (B, T), so that the only
    (B, T, D) buffers besides the inputs are one product and the gradients.

    Args:
        shift: Compare with the next embedding. ``False`` compares each prediction with the embedding at its own
            position, which is met by copying (an ablation of the paper).
        stop_gradient: Detach the target embeddings. ``False`` lets them move towards the predictions, which ends in
            collapse (an ablation of the paper).
        eps: Lower bound of the product of both norms, against division by zero.

    Example:
        >>> model = timm.create_model("nepa_vit_tiny_patch14_224")
        >>> embeddings, predictions = model.predict_next(torch.randn(2, 3, 224, 224))
        >>> loss = NextEmbeddingLoss()(embeddings, predictions)
    """

    def __init__(self, shift: bool = True, stop_gradient: bool = True, eps: float = 1e-8) -> None:
        super().__init__()
        self.shift = shift
        self.stop_gradient = stop_gradient
        self.eps = eps

    def forward(self, embeddings: Tensor, predictions: Tensor, valid: Tensor | None = None, ahead: int = 1) -> Tensor:
        """Return the loss.

        Args:
            embeddings: Input embeddings z (B, T, D), class token first.
            predictions: Predictions z-hat (B, T, D).
            valid: Which embeddings are targets, (B, T); by default all. The mean is over these, of all sequences
                together, and what stands elsewhere has no part in it.
            ahead: How many places after its own a prediction looks; without ``shift`` it is ignored.

        Returns:
            Scalar, float32 also under autocast.

        Raises:
            ValueError: If the shapes differ, or T <= ``ahead`` with ``shift``.
        """
        targets, predictions, valid = self._pairs(embeddings, predictions, valid, ahead)
        with torch.autocast(device_type=predictions.device.type, enabled=False):
            # no copy if the tensors are float32 already, which the final norm's output is under autocast
            return self._loss(targets.float(), predictions.float(), valid)

    def _pairs(
        self, embeddings: Tensor, predictions: Tensor, valid: Tensor | None, ahead: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the targets (B, S, D), what predicts them, and which of them count (B, S)."""
        if embeddings.ndim != 3 or embeddings.shape != predictions.shape:
            raise ValueError(
                f"Expected embeddings and predictions of one shape (B, T, D), got {tuple(embeddings.shape)} and "
                f"{tuple(predictions.shape)}."
            )
        ahead = ahead if self.shift else 0
        if embeddings.shape[1] <= ahead:
            raise ValueError(f"A loss that looks {ahead} ahead needs at least {ahead + 1} tokens per image.")
        if valid is not None:
            if valid.shape != embeddings.shape[:2]:
                raise ValueError(f"Expected valid {tuple(embeddings.shape[:2])}, got {tuple(valid.shape)}.")
            valid = valid[:, ahead:]
        targets = embeddings.detach() if self.stop_gradient else embeddings
        targets, predictions = targets[:, ahead:], predictions[:, : predictions.shape[1] - ahead]
        if valid is not None:  # zero times what is no number would be no number, also in the gradient
            targets, predictions = (part.masked_fill(~valid[:, :, None], 0.0) for part in (targets, predictions))
        return targets, predictions, valid

    def _loss(self, targets: Tensor, predictions: Tensor, valid: Tensor | None) -> Tensor:
        dots = (targets * predictions).sum(-1)
        norms = torch.linalg.vector_norm(targets, dim=-1) * torch.linalg.vector_norm(predictions, dim=-1)
        return _mean(-dots / norms.clamp_min(self.eps), valid)

    def extra_repr(self) -> str:
        """Return the switches for ``repr``."""
        return f"shift={self.shift}, stop_gradient={self.stop_gradient}"


class ContrastiveNextEmbeddingLoss(NextEmbeddingLoss):
    """Cross-entropy of finding the next embedding among all of the same image, by cosine similarity (InfoNCE).

    Where neighbours look alike, a cosine near 1 is had by copying; here a prediction must be nearer to what comes next
    than to the other patches. Source: CPC, arXiv 1807.03748, with SimCLR's normalisation and temperature; among patches
    as in NEPA-DiT, arXiv 2610.02203. Not NEPA's published loss.

    Args:
        shift: As there.
        stop_gradient: As there.
        temperature: Divides the similarities.

    Raises:
        ValueError: If the temperature is not positive.
    """

    def __init__(self, shift: bool = True, stop_gradient: bool = True, temperature: float = 0.1) -> None:
        super().__init__(shift, stop_gradient)
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be positive.")
        self.temperature = temperature

    def _loss(self, targets: Tensor, predictions: Tensor, valid: Tensor | None) -> Tensor:
        similarity = F.normalize(predictions, dim=-1) @ F.normalize(targets, dim=-1).transpose(1, 2)
        logits = similarity / self.temperature
        if valid is not None:
            logits = logits.masked_fill(~valid[:, None, :], -torch.inf)
            logits = torch.where(valid[:, :, None], logits, 0.0)  # of padding, whose loss does not count
        own = logits.diagonal(dim1=1, dim2=2)
        return _mean(logits.logsumexp(dim=-1) - own, valid)

    def extra_repr(self) -> str:
        """Return the switches for ``repr``."""
        return f"{super().extra_repr()}, temperature={self.temperature}"


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mean of values (B, S), of those that are valid where not all are."""
    if valid is None:
        return values.mean()
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp_min(1)
