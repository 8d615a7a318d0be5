"""SimSiam: predict the other view's projection, whose gradient is stopped (arXiv 2011.10566)."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules.heads import SimSiamPredictionHead, SimSiamProjectionHead
from lightly.transforms import SimSiamTransform
from PIL import Image
from torch import Tensor

from nepa_plugin.methods import whole_image
from nepa_plugin.methods.base import Method
from nepa_plugin.methods.transforms import NORMALIZE, build_transform


class SimSiam(Method):
    """Simple Siamese representation learning, on a Vision Transformer.

    Source: arXiv 2011.10566, section 3 (loss, heads, augmentation). No recipe for ViT is published: the optimizer's
    numbers and the frozen patch projection are those of MoCo v3 for ViT-B (arXiv 2104.02057), the nearest method that
    has one. The paper keeps the predictor's learning rate constant; here it follows the schedule of all weights.

    Args:
        hidden_dim: Width of the projection head.
        projection_dim: Outputs of the projection and prediction heads.
        prediction_hidden_dim: Width of the prediction head; a bottleneck, a quarter of ``projection_dim``.
        freeze_patch_projection: Keep the patch projection random.
        transform_args: Options of lightly's ``SimSiamTransform`` that differ from the paper's.
        backbone: Name of a timm Vision Transformer; a ``nepa_vit_*`` needs bidirectional attention.
        init_from: As in :class:`~nepa_plugin.methods.base.Method`.
        pool: As in the base.
        base_lr: As in the base.
        weight_decay: As in the base.
        betas: As in the base.
        warmup_fraction: As in the base.
        clip_grad_norm: As in the base.
        ema_decay: As in the base; the paper has no moving average.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.base.Method`.

    Raises:
        ValueError: If the backbone's class token cannot see the image, or an option of the transform is unknown.
    """

    def __init__(
        self,
        *args: Any,
        hidden_dim: int = 2048,
        projection_dim: int = 2048,
        prediction_hidden_dim: int = 512,
        freeze_patch_projection: bool = True,
        transform_args: dict[str, Any] | None = None,
        backbone: str = "plain_vit_base_patch14_224",
        init_from: str | None = None,
        pool: Literal["mean", "class"] = "class",
        base_lr: float = 1.5e-4,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_fraction: float = 40 / 300,
        clip_grad_norm: float = 0.0,
        ema_decay: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args,
            backbone=backbone,
            init_from=init_from,
            pool=pool,
            base_lr=base_lr,
            weight_decay=weight_decay,
            betas=betas,
            warmup_fraction=warmup_fraction,
            clip_grad_norm=clip_grad_norm,
            ema_decay=ema_decay,
            **kwargs,
        )
        whole_image.check_class_token(self.backbone, pool, "SimSiam")
        if freeze_patch_projection:
            whole_image.freeze_patch_projection(self.backbone, initialize=init_from is None)
        self.transform_args = transform_args
        self.projection_head = SimSiamProjectionHead(self.backbone.num_features, hidden_dim, projection_dim)
        self.prediction_head = SimSiamPredictionHead(projection_dim, prediction_hidden_dim, projection_dim)
        self.criterion = NegativeCosineSimilarity()
        self.train_transform()  # a wrong option fails here
        self.save_hyperparameters(logger=False)

    def train_transform(self) -> Callable[[Image.Image], list[Tensor]]:
        """Return the paper's augmentation at this model's image size: two views."""
        defaults = {"input_size": self.img_size, "normalize": self.normalize}
        views: Callable[[Image.Image], list[Tensor]] = build_transform(SimSiamTransform, defaults, self.transform_args)
        return views

    def step(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the symmetric loss of two views (B, C, H, W), and the first one's features (B, D)."""
        features = self.pooled(self.backbone.forward_features(torch.cat(views))).chunk(2)
        projections = [self.projection_head(view) for view in features]
        predictions = [self.prediction_head(projection) for projection in projections]
        loss = self.criterion(predictions[0], projections[1].detach())
        loss = loss + self.criterion(predictions[1], projections[0].detach())
        return loss / 2, features[0]


transform = SimSiamTransform(normalize=NORMALIZE)
