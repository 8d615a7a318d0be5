"""DINO: self-distillation from two global views to these and to local ones (arXiv 2104.14294)."""

from typing import ClassVar

import torch
from lightly.transforms import DINOTransform
from torch import Tensor

from nepa_plugin.methods.distillation import SelfDistillation
from nepa_plugin.methods.precision import in_float32
from nepa_plugin.methods.transforms import NORMALIZE


class DINO(SelfDistillation):
    """Self-distillation with no labels, with the authors' ViT-B/16 recipe as defaults.

    Every view of the student is matched with the teacher's output for the other global views. Source: arXiv 2104.14294;
    the recipe is that of :class:`~nepa_plugin.methods.distillation.SelfDistillation`.

    Args:
        **kwargs: Arguments of :class:`~nepa_plugin.methods.distillation.SelfDistillation`.

    Raises:
        ValueError: As there.
    """

    transform_class = DINOTransform
    views: ClassVar = {"global_crop_scale": (0.25, 1.0), "local_crop_scale": (0.05, 0.25)}

    def step(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss of two global views (B, C, H, W) and any local ones, and the teacher's features (B, D)."""
        batch, images = len(views[0]), torch.cat(views[:2])
        with torch.no_grad():
            taught = self.pooled(self.teacher_backbone.forward_features(images))
            targets = self.teacher_head(taught).split(batch)
        features = [self.pooled(self.backbone.forward_features(images))]
        if len(views) > 2:
            features.append(self.pooled(self.backbone.forward_features(torch.cat(views[2:]))))
        logits = self.head(torch.cat(features)).split(batch)
        temp = self.current_teacher_temp()
        loss = in_float32(self.criterion, list(targets), list(logits), teacher_temp=temp)
        return loss, taught[:batch]


transform = DINOTransform(**DINO.views, local_crop_size=98, n_local_views=10, normalize=NORMALIZE)
