"""Features as colours: the first three principal components of patch tokens, and their similarity within regions."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def principal_colours(features: Tensor) -> Tensor:
    """Return the first three principal components of patch features as red, green and blue.

    All images share their components, so that the same colour means the same in each.

    Args:
        features: Maps (B, D, rows, columns), D at least three.

    Returns:
        Colours (B, 3, rows, columns) from 0 to 1: every component from its 1st to its 99th percentile.
    """
    tokens = features.float().permute(0, 2, 3, 1).flatten(0, 2)
    centred = tokens - tokens.mean(dim=0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions[:3]
    # the sign of a component is arbitrary: its largest weight is positive
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    scores = centred @ (directions * largest.sign()).T
    low, high = (scores.quantile(q, dim=0) for q in (0.01, 0.99))
    colours = ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return colours.unflatten(0, (features.shape[0], *features.shape[2:])).permute(0, 3, 1, 2)


def similarity_by_region(features: Tensor, labels: Tensor, ignore: int = 255) -> tuple[float, float]:
    """Return the mean cosine of patches of the same and of different regions of one image.

    Args:
        features: (D, rows, columns).
        labels: The region of each patch, (rows, columns) of integers.
        ignore: A label that is none.

    Returns:
        Inside and outside, over all pairs of different patches; not a number where there is no such pair.
    """
    kept = labels.flatten() != ignore
    tokens, regions = normalize(features.float().flatten(1).T[kept], dim=-1), labels.flatten()[kept]
    cosine, same = tokens @ tokens.T, regions[:, None] == regions[None, :]
    other = ~torch.eye(len(tokens), dtype=torch.bool, device=tokens.device)
    return float(cosine[same & other].mean()), float(cosine[~same].mean())
