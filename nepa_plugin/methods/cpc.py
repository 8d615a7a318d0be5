"""CPC: tell the embeddings of the next patches from those of other patches (arXiv 1807.03748)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nepa_plugin.data.transforms import NEPATransform
from nepa_plugin.methods.causal import CausalMethod
from nepa_plugin.methods.precision import in_float32
from nepa_plugin.runtime.ranges import PositiveInt


@dataclass(frozen=True)
class Negatives:
    """The patches that all predictions of a batch are told from.

    Attributes:
        num_patches: Patches per image, N.
        count: How many are drawn, with replacement.
    """

    num_patches: int
    count: int

    def __call__(self, batch_size: int) -> tuple[Tensor]:
        """Draw indices (count,) into the B x N patches of a batch, from torch's global CPU generator."""
        return (torch.randint(batch_size * self.num_patches, (self.count,)),)


def info_nce(predictions: Tensor, targets: Tensor, negatives: Tensor, same: Tensor) -> Tensor:
    """Return the mean cross-entropy of finding the target among the negatives and itself, by dot products.

    Args:
        predictions: (M, D).
        targets: What each of them predicts, (M, D).
        negatives: (K, D), the same for all.
        same: True where a negative is the very patch that is predicted, and does not count, (M, K).

    Returns:
        Scalar; log(K + 1) if nothing can be told apart.
    """
    positive = (predictions * targets).sum(dim=1, keepdim=True)
    negative = (predictions @ negatives.T).masked_fill(same, -torch.inf)
    return (torch.cat([positive, negative], dim=1).logsumexp(dim=1) - positive.squeeze(1)).mean()


class CPC(CausalMethod):
    """Contrastive Predictive Coding over patches: NEPA's contrastive ancestor, on NEPA's own backbone and recipe.

    A causal transformer reads the patches in raster order. From its output at each patch, one matrix per step predicts
    the embedding of the first, second, ... ``horizon``-th patch after it, and the loss asks to find each of these among
    patches drawn from the whole batch, by dot product and without a temperature. The embeddings get gradients as
    inputs, as targets and as negatives: contrast keeps them apart. Source: arXiv 1807.03748, sections 2.2, 2.3 and 3.2.

    Departures: there, a ResNet embeds overlapping crops of 64 pixels, a PixelCNN reads them row by row, and up to five
    rows below are predicted. The paper has no recipe for a Vision Transformer; all of the optimisation is NEPA's, so
    that against NEPA the loss alone differs.

    Args:
        horizon: Patches ahead that are predicted.
        num_negatives: Patches of the batch that each one is told from.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.causal.CausalMethod`.

    Raises:
        ValueError: If the backbone is not a ``nepa_vit_*`` model, or has no ``horizon`` patches after the first.
    """

    title = "CPC"
    takes_orders = True

    def __init__(self, *args: Any, horizon: PositiveInt = 5, num_negatives: PositiveInt = 255, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        patches = self.backbone.patch_embed.num_patches
        if horizon >= patches:
            raise ValueError(f"horizon={horizon} must be less than the {patches} patches of an image.")
        self.horizon = horizon
        self.masks = Negatives(patches, num_negatives)
        dim = self.backbone.embed_dim
        self.predictors = nn.Linear(dim, horizon * dim, bias=False)

    def step(self, views: list[Tensor], masks: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return the contrastive loss of the one view (B, C, H, W), and its features (B, D)."""
        (drawn,) = self.drawn_masks(views[0], masks)
        embeddings, outputs = self.backbone.predict_next(views[0])
        prefix = self.backbone.num_prefix_tokens
        embeddings, contexts = embeddings[:, prefix:], outputs[:, prefix:]
        batch, patches, dim = embeddings.shape
        negatives = embeddings.flatten(0, 1)[drawn]
        own = torch.arange(batch * patches, device=drawn.device).view(batch, patches)
        predicted = self.predictors(contexts).unflatten(-1, (self.horizon, dim))
        losses = []
        for ahead in range(1, self.horizon + 1):
            same = own[:, ahead:].flatten()[:, None] == drawn
            found = predicted[:, :-ahead, ahead - 1].flatten(0, 1), embeddings[:, ahead:].flatten(0, 1)
            losses.append(in_float32(info_nce, *found, negatives, same))
        return torch.stack(losses).mean(), self.pooled(outputs)


transform = NEPATransform()
