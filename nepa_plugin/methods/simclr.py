"""SimCLR: tell the two views of an image from those of all others in the batch (arXiv 2002.05709)."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules.heads import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from PIL import Image
from torch import Tensor

from nepa_plugin.methods import whole_image
from nepa_plugin.methods.base import Method
from nepa_plugin.methods.transforms import NORMALIZE, build_transform


class SimCLR(Method):
    """A simple framework for contrastive learning, on a Vision Transformer.

    Source: arXiv 2002.05709, section 2 (loss, augmentation, head of two layers). That paper has no ViT: the optimizer's
    numbers and the frozen patch projection are those of MoCo v3's paper (arXiv 2104.02057) for SimCLR on ViT-B, as we
    remember them and without its text at hand: AdamW, 2e-4 per 256 images, weight decay 0.1, batch 4096, 40 of 300
    epochs of warm-up, no clipping.

    Args:
        temperature: Temperature of the softmax over cosine similarities.
        hidden_dim: Width of the projection head.
        projection_dim: Outputs of the projection head.
        freeze_patch_projection: Keep the patch projection random.
        transform_args: Options of lightly's ``SimCLRTransform`` that differ from the paper's.
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
        temperature: float = 0.1,
        hidden_dim: int = 2048,
        projection_dim: int = 128,
        freeze_patch_projection: bool = True,
        transform_args: dict[str, Any] | None = None,
        backbone: str = "plain_vit_base_patch14_224",
        init_from: str | None = None,
        pool: Literal["mean", "class"] = "class",
        base_lr: float = 2e-4,
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
        whole_image.check_class_token(self.backbone, pool, "SimCLR")
        if freeze_patch_projection:
            whole_image.freeze_patch_projection(self.backbone, initialize=init_from is None)
        self.transform_args = transform_args
        self.projection_head = SimCLRProjectionHead(self.backbone.num_features, hidden_dim, projection_dim)
        self.criterion = NTXentLoss(temperature=temperature, gather_distributed=True)
        self.train_transform()  # a wrong option fails here
        self.save_hyperparameters(logger=False)

    def train_transform(self) -> Callable[[Image.Image], list[Tensor]]:
        """Return the paper's augmentation at this model's image size: two views."""
        defaults = {"input_size": self.img_size, "normalize": self.normalize}
        views: Callable[[Image.Image], list[Tensor]] = build_transform(SimCLRTransform, defaults, self.transform_args)
        return views

    def step(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the contrastive loss of two views (B, C, H, W), and the first one's features (B, D)."""
        features = self.pooled(self.backbone.forward_features(torch.cat(views)))
        first, second = self.projection_head(features).chunk(2)
        return self.criterion(first, second), features.chunk(2)[0]


transform = SimCLRTransform(normalize=NORMALIZE)
