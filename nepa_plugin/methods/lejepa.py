"""LeJEPA: views of an image agree, and all embeddings together are an isotropic Gaussian (arXiv 2511.08544)."""

from typing import Any

import torch
from lightly.loss import LeJEPALoss
from lightly.models.modules.heads import LeJEPAProjectionHead
from lightly.transforms.dino_transform import DINOViewTransform
from lightly.transforms.multi_view_transform import MultiViewTransform
from torch import Tensor

from nepa_plugin.methods.multi_crop import MultiCrop
from nepa_plugin.methods.precision import in_float32
from nepa_plugin.methods.transforms import NORMALIZE
from nepa_plugin.runtime.ranges import FractionBelowOne, LearningRate, NonNegativeFloat, NonNegativeInt, PositiveInt


class LeJEPATransform(MultiViewTransform):
    """The authors' augmentation: global and local views that differ in size and scale only.

    Source: the table of hyperparameters that comes with the authors' code of arXiv 2511.08544.

    Args:
        global_crop_size: Side of the two global views in pixels.
        global_crop_scale: Range of their area as a fraction of the image.
        local_crop_size: Side of the local views in pixels.
        local_crop_scale: Range of their area as a fraction of the image.
        n_local_views: Number of local views.
        hf_prob: Probability of a horizontal flip.
        cj_prob: Probability of colour jitter.
        cj_strength: Factor of the jitter's brightness, contrast, saturation and hue 0.8, 0.8, 0.4 and 0.2.
        random_gray_scale: Probability of conversion to grey.
        gaussian_blur: Probability of blur.
        solarization_prob: Probability of solarisation.
        normalize: ``mean`` and ``std`` per channel.
    """

    def __init__(
        self,
        global_crop_size: int = 224,
        global_crop_scale: tuple[float, float] = (0.3, 1.0),
        local_crop_size: int = 98,
        local_crop_scale: tuple[float, float] = (0.05, 0.3),
        n_local_views: int = 6,
        hf_prob: float = 0.5,
        cj_prob: float = 0.8,
        cj_strength: float = 0.5,
        random_gray_scale: float = 0.2,
        gaussian_blur: float = 0.5,
        solarization_prob: float = 0.2,
        normalize: dict[str, list[float]] = NORMALIZE,
    ) -> None:
        def view(size: int, scale: tuple[float, float]) -> DINOViewTransform:
            return DINOViewTransform(
                crop_size=size,
                crop_scale=scale,
                hf_prob=hf_prob,
                cj_prob=cj_prob,
                cj_strength=cj_strength,
                random_gray_scale=random_gray_scale,
                gaussian_blur=gaussian_blur,
                solarization_prob=solarization_prob,
                normalize=normalize,
            )

        global_view, local_view = view(global_crop_size, global_crop_scale), view(local_crop_size, local_crop_scale)
        super().__init__([global_view] * 2 + [local_view] * n_local_views)


class LeJEPA(MultiCrop):
    """Latent-Euclidean Joint-Embedding Predictive Architecture, with the authors' recipe as defaults.

    No momentum encoder, no stopped gradient: the projections of all views are drawn to the mean of the global ones,
    and SIGReg keeps their distribution an isotropic Gaussian. Source: arXiv 2511.08544 and the hyperparameters that
    come with the authors' code: 5e-4 (taken as per 256 images) to a thousandth of it, weight decay 0.05 for ViT, two
    global and six local views, no clipping; lambda, head and number of slices are lightly's, one epoch of warm-up (of
    100) and stochastic depth 0.1 those of the authors' example.

    Args:
        lambda_param: Weight of SIGReg; the views' agreement has 1 - ``lambda_param``.
        num_vectors: Random directions in which SIGReg looks at the projections.
        hidden_dim: Width of the projection head.
        projection_dim: Outputs of the projection head.
        num_local_crops: Local views per image.
        base_lr: Learning rate per 256 images of the global batch.
        min_lr: Learning rate at the end of the cosine.
        warmup_fraction: Linear warm-up as a fraction of all steps.
        clip_grad_norm: Largest norm of the gradient (without the probe's); 0 turns clipping off.
        ema_decay: Decay of the moving average of the weights; off, the paper has none.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.multi_crop.MultiCrop`.

    Raises:
        ValueError: If there is no local view, ``lambda_param`` is outside [0, 1], or as there.
    """

    transform_class = LeJEPATransform
    local_size_at_224 = 98

    def __init__(
        self,
        *args: Any,
        lambda_param: NonNegativeFloat = 0.05,
        num_vectors: PositiveInt = 1024,
        hidden_dim: PositiveInt = 2048,
        projection_dim: PositiveInt = 64,
        num_local_crops: NonNegativeInt = 6,
        base_lr: LearningRate = 5e-4,
        min_lr: LearningRate = 5e-7,
        warmup_fraction: FractionBelowOne = 0.01,
        clip_grad_norm: NonNegativeFloat = 0.0,
        ema_decay: FractionBelowOne | None = 0.0,
        **kwargs: Any,
    ) -> None:
        if num_local_crops < 1:
            raise ValueError(f"num_local_crops={num_local_crops}: LeJEPA needs at least one local view.")
        super().__init__(
            *args,
            num_local_crops=num_local_crops,
            base_lr=base_lr,
            min_lr=min_lr,
            warmup_fraction=warmup_fraction,
            clip_grad_norm=clip_grad_norm,
            ema_decay=ema_decay,
            **kwargs,
        )
        self.projection_head = LeJEPAProjectionHead(self.backbone.num_features, hidden_dim, projection_dim)
        self.criterion = LeJEPALoss(lambda_param, gather_distributed=True, sigreg_num_vectors=num_vectors)

    def step(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss of two global and the local views (B, C, H, W), and the first one's features (B, D)."""
        batch = len(views[0])
        images = (torch.cat(views[:2]), torch.cat(views[2:]))
        features = torch.cat([self.pooled(self.backbone.forward_features(size)) for size in images])
        projections = torch.stack(self.projection_head(features).split(batch))
        loss = in_float32(self.criterion, local_proj=projections[2:], global_proj=projections[:2])
        return loss, features[:batch]


transform = LeJEPATransform()
