"""Collapse diagnostics: how far a set of embeddings is from being one and the same vector."""

import torch
from torch import Tensor


def _unbatched(embeddings: Tensor) -> Tensor:
    if embeddings.ndim != 2 or len(embeddings) < 2:
        raise ValueError(f"Expected at least two embeddings (N, D), got shape {tuple(embeddings.shape)}.")
    return embeddings.float()


def mean_pairwise_cosine(embeddings: Tensor) -> Tensor:
    """Return the mean cosine similarity over all pairs of different embeddings.

    Uses that the squared norm of the sum of N unit vectors is N plus the sum over all ordered pairs.

    Args:
        embeddings: Vectors (N, D).

    Returns:
        Scalar in [-1, 1], float32; 1 is complete collapse.

    Raises:
        ValueError: If there are fewer than two.
    """
    unit = torch.nn.functional.normalize(_unbatched(embeddings), dim=-1)
    n = len(unit)
    return (unit.sum(0).square().sum() - n) / (n * (n - 1))


def effective_rank(embeddings: Tensor) -> Tensor:
    """Return the exponential of the entropy of the normalised singular values.

    Source: Roy and Vetterli 2007; for representations RankMe, arXiv 2210.02885. The embeddings are not centred.

    Args:
        embeddings: Vectors (N, D).

    Returns:
        Scalar in [1, min(N, D)], float32; 1 is complete collapse onto a line.

    Raises:
        ValueError: If there are fewer than two.
    """
    with torch.autocast(device_type=embeddings.device.type, enabled=False):
        singular = torch.linalg.svdvals(_unbatched(embeddings))
        p = singular / singular.sum().clamp_min(torch.finfo(torch.float32).tiny)
        return torch.special.entr(p).sum().exp()
