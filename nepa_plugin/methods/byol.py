"""BYOL: predict a momentum encoder's projection of another view (arXiv 2006.07733)."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
from PIL import Image
from torch import Tensor, nn

from nepa_plugin.methods import whole_image
from nepa_plugin.methods.momentum import MomentumMethod
from nepa_plugin.methods.transforms import byol_transform


class BYOL(MomentumMethod):
    """Bootstrap Your Own Latent, on a Vision Transformer.

    The loss is the mean negative cosine of predictions and targets over both assignments of the two views; the paper's
    is 4 times this plus 4. Source: arXiv 2006.07733, section 3 (loss, augmentation, heads, momentum 0.996 to 1). That
    paper has no ViT: the optimizer's numbers and the frozen patch projection are those of MoCo v3's paper (arXiv
    2104.02057) for BYOL on ViT-B, as we remember them and without its text at hand: AdamW, 1e-4 per 256 images, weight
    decay 0.03, batch 4096, 40 of 300 epochs of warm-up, no clipping.

    Args:
        hidden_dim: Width of the projection and prediction heads.
        projection_dim: Outputs of both heads.
        freeze_patch_projection: Keep the patch projection random.
        transform_args: Options of lightly's ``BYOLView1Transform`` that differ from the paper's, for both views.
        backbone: Name of a timm Vision Transformer; a ``nepa_vit_*`` needs bidirectional attention.
        init_from: As in :class:`~nepa_plugin.methods.base.Method`.
        pool: As in the base.
        base_lr: As in the base.
        weight_decay: As in the base.
        betas: As in the base.
        warmup_fraction: As in the base.
        clip_grad_norm: As in the base.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.momentum.MomentumMethod`.

    Raises:
        ValueError: If the backbone's class token cannot see the image, or an option of the transform is unknown.
    """

    def __init__(
        self,
        *args: Any,
        hidden_dim: int = 4096,
        projection_dim: int = 256,
        freeze_patch_projection: bool = True,
        transform_args: dict[str, Any] | None = None,
        backbone: str = "plain_vit_base_patch14_224",
        init_from: str | None = None,
        pool: Literal["mean", "class"] = "class",
        base_lr: float = 1e-4,
        weight_decay: float = 0.03,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_fraction: float = 40 / 300,
        clip_grad_norm: float = 0.0,
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
            **kwargs,
        )
        whole_image.check_class_token(self.backbone, pool, "BYOL")
        if freeze_patch_projection:
            whole_image.freeze_patch_projection(self.backbone, initialize=init_from is None)
            self.teacher_backbone = self.momentum_copy(self.backbone)
        self.transform_args = transform_args
        self.projection_head = BYOLProjectionHead(self.backbone.num_features, hidden_dim, projection_dim)
        self.prediction_head = BYOLPredictionHead(projection_dim, hidden_dim, projection_dim)
        self.teacher_projection_head = self.momentum_copy(self.projection_head)
        self.criterion = NegativeCosineSimilarity()
        self.train_transform()  # a wrong option fails here
        self.save_hyperparameters(logger=False)

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return backbone and projection head with their momentum copies; the predictor has none."""
        return [*super().momentum_pairs(), (self.projection_head, self.teacher_projection_head)]

    def train_transform(self) -> Callable[[Image.Image], list[Tensor]]:
        """Return the paper's augmentation at this model's image size: two views."""
        return byol_transform(self.img_size, self.normalize, self.transform_args)

    def step(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the symmetric loss of two views (B, C, H, W), and the first one's features (B, D)."""
        features = self.pooled(self.backbone.forward_features(torch.cat(views))).chunk(2)
        predictions = [self.prediction_head(self.projection_head(view)) for view in features]
        with torch.no_grad():
            encoded = self.pooled(self.teacher_backbone.forward_features(torch.cat(views))).chunk(2)
            targets = [self.teacher_projection_head(view) for view in encoded]
        loss = self.criterion(predictions[0], targets[1]) + self.criterion(predictions[1], targets[0])
        return loss / 2, features[0]


transform = byol_transform()
