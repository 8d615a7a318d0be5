"""SimCLR: tell the two views of an image from those of all others in the batch (arXiv 2002.05709)."""

from typing import Any

import torch
from lightly.models.modules.heads import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch import Tensor

from nepa_plugin.methods.losses import NTXent
from nepa_plugin.methods.precision import in_float32
from nepa_plugin.methods.transforms import NORMALIZE
from nepa_plugin.methods.whole_image import WholeImage
from nepa_plugin.runtime.ranges import LearningRate, PositiveFloat, PositiveInt


class SimCLR(WholeImage):
    """A simple framework for contrastive learning, on a Vision Transformer.

    Source: arXiv 2002.05709, section 2 (loss, augmentation, head of two layers). That paper has no ViT: the recipe is
    the one of MoCo v3's paper for SimCLR on ViT-B, with 2e-4 per 256 images, as we remember it and without its text at
    hand.

    Args:
        temperature: Temperature of the softmax over cosine similarities.
        hidden_dim: Width of the projection head.
        projection_dim: Outputs of the projection head.
        base_lr: Learning rate per 256 images of the global batch.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.whole_image.WholeImage`.
    """

    transform_class = SimCLRTransform

    def __init__(
        self,
        *args: Any,
        temperature: PositiveFloat = 0.1,
        hidden_dim: PositiveInt = 2048,
        projection_dim: PositiveInt = 128,
        base_lr: LearningRate = 2e-4,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, base_lr=base_lr, **kwargs)
        self.projection_head = SimCLRProjectionHead(self.backbone.num_features, hidden_dim, projection_dim)
        self.criterion = NTXent(temperature=temperature, gather_distributed=True)

    def step(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the contrastive loss of two views (B, C, H, W), and the first one's features (B, D)."""
        features = self.pooled(self.backbone.forward_features(torch.cat(views)))
        first, second = self.projection_head(features).chunk(2)
        return in_float32(self.criterion, first, second), features.chunk(2)[0]


transform = SimCLRTransform(normalize=NORMALIZE)
