"""How surprising each patch of an image is to a predictor, and what it expected instead."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from nepa_plugin.analysis.modes import evaluating
from nepa_plugin.order import patch_order
from nepa_plugin.predictor import NepaViT


@dataclass(frozen=True)
class Surprise:
    """Surprise by patch, in raster order.

    Attributes:
        predicting: 1 minus the cosine of each patch's predicted to its own embedding, (B, rows, columns): 0 to 2.
        copying: 1 minus the cosine of the embedding that is read before it to its own, (B, rows, columns); of the first
            patch, whose predecessor is no patch, not a number.
    """

    predicting: Tensor
    copying: Tensor

    @property
    def score(self) -> Tensor:
        """The mean over an image's patches (B,): the images with the largest are those that were foreseen worst."""
        return self.predicting.flatten(1).mean(dim=1)


@torch.inference_mode()
def surprise(model: NepaViT, images: Tensor) -> Surprise:
    """Return how far the predicted embedding of every patch is from its own.

    Where it is large, the patch could not be told from those read before it: an edge, a new object, a reflection. The
    surprise of copying says how different neighbours are anyway: on a smooth surface both are small, and only the
    difference of the two says that something was predicted.

    Args:
        model: The predictor.
        images: Normalised images (B, C, H, W).
    """
    model.check_predicts()
    with evaluating(model):
        embeddings, predictions = model.predict_next(images)
    prefix = model.num_prefix_tokens
    grid = model.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
    places = torch.tensor(patch_order(model.order, *grid), device=images.device).argsort()
    embeddings, predictions = embeddings.float(), predictions.float()
    found = []
    for before in (predictions, embeddings):
        away = 1 - cosine_similarity(before[:, prefix - 1 : -1], embeddings[:, prefix:], dim=-1)
        if before is embeddings:
            away[:, 0] = torch.nan
        found.append(away[:, places].unflatten(1, grid))
    return Surprise(*found)


def most_surprising(model: NepaViT, batches: Iterable[Tensor]) -> list[tuple[int, float]]:
    """Return (index, mean surprise) of all images of some batches (B, C, H, W), the most surprising first."""
    scores = torch.cat([surprise(model, images).score.cpu() for images in batches]).tolist()
    return sorted(enumerate(scores), key=lambda item: -item[1])
