"""SimSiam: predict the other view's projection, whose gradient is stopped (arXiv 2011.10566)."""

from typing import Any

import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules.heads import SimSiamPredictionHead, SimSiamProjectionHead
from lightly.transforms import SimSiamTransform
from torch import Tensor

from nepa_plugin.methods.precision import in_float32
from nepa_plugin.methods.transforms import NORMALIZE
from nepa_plugin.methods.whole_image import WholeImage
from nepa_plugin.runtime.ranges import PositiveInt


class SimSiam(WholeImage):
    """Simple Siamese representation learning, on a Vision Transformer.

    Source: arXiv 2011.10566, section 3 (loss, heads, augmentation). No recipe for ViT is published: it is that of MoCo
    v3, the nearest method that has one. The paper keeps the predictor's learning rate constant; here it follows the
    schedule of all weights.

    Args:
        hidden_dim: Width of the projection head.
        projection_dim: Outputs of the projection and prediction heads.
        prediction_hidden_dim: Width of the prediction head; a bottleneck, a quarter of ``projection_dim``.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.whole_image.WholeImage`.
    """

    transform_class = SimSiamTransform

    def __init__(
        self,
        *args: Any,
        hidden_dim: PositiveInt = 2048,
        projection_dim: PositiveInt = 2048,
        prediction_hidden_dim: PositiveInt = 512,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.projection_head = SimSiamProjectionHead(self.backbone.num_features, hidden_dim, projection_dim)
        self.prediction_head = SimSiamPredictionHead(projection_dim, prediction_hidden_dim, projection_dim)
        self.criterion = NegativeCosineSimilarity()

    def step(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the symmetric loss of two views (B, C, H, W), and the first one's features (B, D)."""
        features = self.pooled(self.backbone.forward_features(torch.cat(views))).chunk(2)
        projections = [self.projection_head(view) for view in features]
        predictions = [self.prediction_head(projection) for projection in projections]
        losses = [in_float32(self.criterion, predictions[i], projections[1 - i].detach()) for i in range(2)]
        return (losses[0] + losses[1]) / 2, features[0]


transform = SimSiamTransform(normalize=NORMALIZE)
