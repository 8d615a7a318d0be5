"""What a predictor expects to see next: cosine similarity of a predicted embedding to all patch embeddings."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from nepa_plugin.analysis.modes import evaluating
from nepa_plugin.order import patch_order
from nepa_plugin.predictor import NepaViT


@torch.inference_mode()
def similarity_maps(model: NepaViT, images: Tensor, queries: Sequence[int]) -> Tensor:
    """Return, for each query patch, the similarity of its predicted embedding to every patch's embedding.

    The embedding of a patch is predicted from the patches that are read before it, in raster order at token q.

    Args:
        model: The predictor.
        images: Normalised images (B, C, H, W).
        queries: Indices of patches.

    Returns:
        Cosine similarities (B, Q, rows, columns).

    Raises:
        ValueError: If a query is no patch of these images.
    """
    model.check_predicts()
    with evaluating(model):
        embeddings, predictions = model.predict_next(images)
    rows, columns = model.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
    places = torch.tensor(patch_order(model.order, rows, columns), device=embeddings.device).argsort()
    patches = normalize(embeddings[:, model.num_prefix_tokens :].float(), dim=-1)[:, places]
    odd = [q for q in queries if not 0 <= q < patches.shape[1]]
    if odd:
        raise ValueError(f"Query patches {odd} are not in 0..{patches.shape[1] - 1}.")
    before = model.num_prefix_tokens - 1 + places[list(queries)]  # the token that is read before the query
    predicted = normalize(predictions[:, before].float(), dim=-1)
    return (predicted @ patches.mT).unflatten(-1, (rows, columns))
