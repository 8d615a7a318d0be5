"""MoCo v3: contrast predictions with the keys of a momentum encoder (arXiv 2104.02057)."""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightly.models.modules.heads import MoCoProjectionHead
from lightly.utils import dist
from PIL import Image
from torch import Tensor, nn

from nepa_plugin.methods import whole_image
from nepa_plugin.methods.momentum import MomentumMethod
from nepa_plugin.methods.transforms import byol_transform


class MoCoV3(MomentumMethod):
    """Momentum Contrast, version 3, with the paper's ViT-B recipe as defaults.

    Symmetric InfoNCE: the prediction of each view is matched with the momentum encoder's key of the other view, among
    the keys of all images of the global batch. lightly's ``NTXentLoss`` is another loss, as it takes the other
    predictions of the same view for negatives too. Source: arXiv 2104.02057, algorithm 1 and section 4.2, and the
    authors' ViT-B command: batch 4096, 300 epochs, 40 of them warm-up, 1.5e-4 per 256 images, weight decay 0.1,
    temperature 0.2, momentum 0.99 to 1. The authors' position embedding is a fixed sine-cosine one and the last
    BatchNorm of their heads has no weights; here they are the backbone's and lightly's.

    Args:
        temperature: Temperature of the softmax over cosine similarities; the loss is scaled by twice its value.
        hidden_dim: Width of the projection and prediction heads.
        projection_dim: Outputs of both heads.
        freeze_patch_projection: Keep the patch projection random, which stabilises training.
        transform_args: Options of lightly's ``BYOLView1Transform`` that differ from the paper's, for both views.
        backbone: Name of a timm Vision Transformer; a ``nepa_vit_*`` needs bidirectional attention.
        init_from: As in :class:`~nepa_plugin.methods.base.Method`.
        pool: As in the base.
        momentum: As in :class:`~nepa_plugin.methods.momentum.MomentumMethod`.
        base_lr: As in the base.
        weight_decay: As in the base.
        betas: As in the base.
        warmup_fraction: As in the base.
        clip_grad_norm: As in the base.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.momentum.MomentumMethod`.

    Raises:
        ValueError: If the backbone's class token cannot see the image, the temperature is not positive, or an option
            of the transform is unknown.
    """

    def __init__(
        self,
        *args: Any,
        temperature: float = 0.2,
        hidden_dim: int = 4096,
        projection_dim: int = 256,
        freeze_patch_projection: bool = True,
        transform_args: dict[str, Any] | None = None,
        backbone: str = "plain_vit_base_patch14_224",
        init_from: str | None = None,
        pool: Literal["mean", "class"] = "class",
        momentum: float = 0.99,
        base_lr: float = 1.5e-4,
        weight_decay: float = 0.1,
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
            momentum=momentum,
            base_lr=base_lr,
            weight_decay=weight_decay,
            betas=betas,
            warmup_fraction=warmup_fraction,
            clip_grad_norm=clip_grad_norm,
            **kwargs,
        )
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be positive.")
        whole_image.check_class_token(self.backbone, pool, "MoCoV3")
        if freeze_patch_projection:
            whole_image.freeze_patch_projection(self.backbone, initialize=init_from is None)
            self.teacher_backbone = self.momentum_copy(self.backbone)
        self.temperature = temperature
        self.transform_args = transform_args
        self.projection_head = MoCoProjectionHead(
            self.backbone.num_features, hidden_dim, projection_dim, num_layers=3, batch_norm=True
        )
        self.prediction_head = MoCoProjectionHead(
            projection_dim, hidden_dim, projection_dim, num_layers=2, batch_norm=True
        )
        self.teacher_projection_head = self.momentum_copy(self.projection_head)
        self.train_transform()  # a wrong option fails here
        self.save_hyperparameters(logger=False)

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return backbone and projection head with their momentum copies; the predictor has none."""
        return [*super().momentum_pairs(), (self.projection_head, self.teacher_projection_head)]

    def train_transform(self) -> Callable[[Image.Image], list[Tensor]]:
        """Return the paper's augmentation, which is BYOL's, at this model's image size: two views."""
        return byol_transform(self.img_size, self.normalize, self.transform_args)

    def step(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the symmetric loss of two views (B, C, H, W), and the first one's features (B, D)."""
        features = self.pooled(self.backbone.forward_features(torch.cat(views))).chunk(2)
        queries = [self.prediction_head(self.projection_head(view)) for view in features]
        with torch.no_grad():
            targets = self.pooled(self.teacher_backbone.forward_features(torch.cat(views))).chunk(2)
            keys = [self.teacher_projection_head(view) for view in targets]
        return self.contrast(queries[0], keys[1]) + self.contrast(queries[1], keys[0]), features[0]

    def contrast(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return InfoNCE of queries (B, D) with keys (B, D), among the keys of all devices."""
        queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
        if dist.world_size() > 1:
            keys = torch.cat(dist.gather(keys))
        labels = torch.arange(len(queries), device=queries.device) + dist.rank() * len(queries)
        return 2 * self.temperature * F.cross_entropy(queries @ keys.T / self.temperature, labels)


transform = byol_transform()
