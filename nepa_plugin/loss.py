"""The next-embedding loss: negative cosine similarity of each prediction to the next input embedding."""

import torch
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

    def forward(self, embeddings: Tensor, predictions: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            embeddings: Input embeddings z (B, T, D), class token first.
            predictions: Predictions z-hat (B, T, D).
            valid: Which embeddings are targets, (B, T); by default all. The mean is over these, of all sequences
                together, and what stands elsewhere has no part in it.

        Returns:
            Scalar, float32 also under autocast.

        Raises:
            ValueError: If the shapes differ, or T < 2 with ``shift``.
        """
        if embeddings.ndim != 3 or embeddings.shape != predictions.shape:
            raise ValueError(
                f"Expected embeddings and predictions of one shape (B, T, D), got {tuple(embeddings.shape)} and "
                f"{tuple(predictions.shape)}."
            )
        if self.shift and embeddings.shape[1] < 2:
            raise ValueError("The next-embedding loss needs at least two tokens per image.")
        if valid is not None:
            if valid.shape != embeddings.shape[:2]:
                raise ValueError(f"Expected valid {tuple(embeddings.shape[:2])}, got {tuple(valid.shape)}.")
            valid = valid[:, 1:] if self.shift else valid
        targets = embeddings.detach() if self.stop_gradient else embeddings
        if self.shift:
            targets, predictions = targets[:, 1:], predictions[:, :-1]
        with torch.autocast(device_type=predictions.device.type, enabled=False):
            # no copy if the tensors are float32 already, which the final norm's output is under autocast
            targets, predictions = targets.float(), predictions.float()
            dots = (targets * predictions).sum(-1)
            norms = torch.linalg.vector_norm(targets, dim=-1) * torch.linalg.vector_norm(predictions, dim=-1)
            cosines = dots / norms.clamp_min(self.eps)
            if valid is None:
                return -cosines.mean()
            return -torch.where(valid, cosines, 0.0).sum() / valid.sum().clamp_min(1)

    def extra_repr(self) -> str:
        """Return the switches for ``repr``."""
        return f"shift={self.shift}, stop_gradient={self.stop_gradient}"
