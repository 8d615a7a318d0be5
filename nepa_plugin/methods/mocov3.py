"""MoCo v3: contrast predictions with the keys of a momentum encoder (arXiv 2104.02057)."""

from typing import Any

import torch
import torch.nn.functional as F
from lightly.models.modules.heads import MoCoProjectionHead
from lightly.utils import dist
from torch import Tensor

from nepa_plugin.methods.momentum import MomentumMethod
from nepa_plugin.methods.precision import in_float32
from nepa_plugin.methods.transforms import BYOLViews
from nepa_plugin.methods.whole_image import WholeImage
from nepa_plugin.runtime.ranges import Fraction, PositiveFloat, PositiveInt


class MoCoV3(WholeImage, MomentumMethod):
    """Momentum Contrast, version 3, with the paper's ViT-B recipe as defaults.

    Symmetric InfoNCE: the prediction of each view is matched with the momentum encoder's key of the other view, among
    the keys of all images of the global batch. lightly's ``NTXentLoss`` is another loss, as it takes the other
    predictions of the same view for negatives too. Source: arXiv 2104.02057, algorithm 1 and section 4.2; temperature
    0.2 and momentum 0.99 to 1 of the authors' ViT-B command. The authors' position embedding is a fixed sine-cosine one
    and the last BatchNorm of their heads has no weights; here they are the backbone's and lightly's.

    Args:
        temperature: Temperature of the softmax over cosine similarities; the loss is scaled by twice its value.
        hidden_dim: Width of the projection and prediction heads.
        projection_dim: Outputs of both heads.
        momentum: m at the start.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.whole_image.WholeImage` and
            :class:`~nepa_plugin.methods.momentum.MomentumMethod`.

    Raises:
        ValueError: If the temperature is not positive, or as in these two.
    """

    transform_class = BYOLViews

    def __init__(
        self,
        *args: Any,
        temperature: PositiveFloat = 0.2,
        hidden_dim: PositiveInt = 4096,
        projection_dim: PositiveInt = 256,
        momentum: Fraction = 0.99,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, momentum=momentum, **kwargs)
        self.temperature = temperature
        width = self.backbone.num_features
        self.projection_head = MoCoProjectionHead(width, hidden_dim, projection_dim, num_layers=3, batch_norm=True)
        self.prediction_head = MoCoProjectionHead(
            projection_dim, hidden_dim, projection_dim, num_layers=2, batch_norm=True
        )
        self.teacher_projection_head = self.momentum_copy(self.projection_head)

    def step(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the symmetric loss of two views (B, C, H, W), and the first one's features (B, D)."""
        features = self.pooled(self.backbone.forward_features(torch.cat(views))).chunk(2)
        queries = [self.prediction_head(self.projection_head(view)) for view in features]
        with torch.no_grad():
            targets = self.pooled(self.teacher_backbone.forward_features(torch.cat(views))).chunk(2)
            keys = [self.teacher_projection_head(view) for view in targets]
        losses = [in_float32(self.contrast, queries[i], keys[1 - i]) for i in range(2)]
        return losses[0] + losses[1], features[0]

    def contrast(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return InfoNCE of queries (B, D) with keys (B, D), among the keys of all devices."""
        queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
        if dist.world_size() > 1:
            keys = torch.cat(dist.gather(keys))
        labels = torch.arange(len(queries), device=queries.device) + dist.rank() * len(queries)
        return 2 * self.temperature * F.cross_entropy(queries @ keys.T / self.temperature, labels)


transform = BYOLViews()
