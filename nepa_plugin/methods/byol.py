"""BYOL: predict a momentum encoder's projection of another view (arXiv 2006.07733)."""

from typing import Any

import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
from torch import Tensor

from nepa_plugin.methods.momentum import MomentumMethod
from nepa_plugin.methods.precision import in_float32
from nepa_plugin.methods.transforms import BYOLViews
from nepa_plugin.methods.whole_image import WholeImage
from nepa_plugin.runtime.ranges import LearningRate, NonNegativeFloat, PositiveInt


class BYOL(WholeImage, MomentumMethod):
    """Bootstrap Your Own Latent, on a Vision Transformer.

    The loss is the mean negative cosine of predictions and targets over both assignments of the two views; the paper's
    is 4 times this plus 4. Source: arXiv 2006.07733, section 3 (loss, augmentation, heads, momentum 0.996 to 1). That
    paper has no ViT: the recipe is the one of MoCo v3's paper for BYOL on ViT-B, with 1e-4 per 256 images and weight
    decay 0.03, as we remember it and without its text at hand.

    Args:
        hidden_dim: Width of the projection and prediction heads.
        projection_dim: Outputs of both heads.
        base_lr: Learning rate per 256 images of the global batch.
        weight_decay: AdamW weight decay of matrices; biases, norms and LayerScale have none.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.whole_image.WholeImage` and
            :class:`~nepa_plugin.methods.momentum.MomentumMethod`.
    """

    transform_class = BYOLViews

    def __init__(
        self,
        *args: Any,
        hidden_dim: PositiveInt = 4096,
        projection_dim: PositiveInt = 256,
        base_lr: LearningRate = 1e-4,
        weight_decay: NonNegativeFloat = 0.03,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, base_lr=base_lr, weight_decay=weight_decay, **kwargs)
        self.projection_head = BYOLProjectionHead(self.backbone.num_features, hidden_dim, projection_dim)
        self.prediction_head = BYOLPredictionHead(projection_dim, hidden_dim, projection_dim)
        self.teacher_projection_head = self.momentum_copy(self.projection_head)
        self.criterion = NegativeCosineSimilarity()

    def step(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the symmetric loss of two views (B, C, H, W), and the first one's features (B, D)."""
        features = self.pooled(self.backbone.forward_features(torch.cat(views))).chunk(2)
        predictions = [self.prediction_head(self.projection_head(view)) for view in features]
        with torch.no_grad():
            encoded = self.pooled(self.teacher_backbone.forward_features(torch.cat(views))).chunk(2)
            targets = [self.teacher_projection_head(view) for view in encoded]
        losses = [in_float32(self.criterion, predictions[i], targets[1 - i]) for i in range(2)]
        return (losses[0] + losses[1]) / 2, features[0]


transform = BYOLViews()
