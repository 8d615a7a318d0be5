"""I-JEPA: predict the representations of target blocks from a context block (arXiv 2301.08243)."""

from collections.abc import Sequence
from typing import Any

import torch
from lightly.models.modules import IJEPAPredictorTIMM
from lightly.models.utils import apply_masks
from lightly.transforms.ijepa_transform import IJEPATransform
from torch import Tensor
from torch.nn import functional as F

from nepa_plugin.methods.masked import MaskedMethod, SingleView, masked_encoder, with_prefix
from nepa_plugin.methods.masks import BlockMasks
from nepa_plugin.methods.momentum import MomentumMethod
from nepa_plugin.methods.precision import in_float32
from nepa_plugin.runtime.ranges import (
    Fraction,
    FractionBelowOne,
    LearningRate,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Scale,
)


class IJEPA(MaskedMethod, MomentumMethod):
    """Image-based Joint-Embedding Predictive Architecture with the paper's recipe as defaults.

    A predictor gets the context patches' representations and the positions of a target block, and predicts what the
    momentum encoder makes of the target patches when it sees the whole image. The momentum encoder is exported. The
    paper has no class token: a backbone's class token goes through the encoder like a register, in training as in
    evaluation, and is neither predicted nor given to the predictor (``backbone_args: {class_token: false, global_pool:
    avg}`` leaves it out).

    Source: arXiv 2301.08243, section 3 and appendix A: batch 2048, learning rate 1e-3 after 15 of 600 epochs of
    warm-up, cosine to 1e-6, weight decay 0.04 to 0.4, momentum 0.996 to 1, predictor of width 384 and, for ViT-B, 6
    blocks; crops, no flips and ``min_keep`` as in the authors' configs. The momentum follows a cosine here, there a
    line.

    Args:
        predictor_dim: Width of the predictor.
        predictor_depth: Blocks of the predictor.
        predictor_num_heads: Attention heads of the predictor; the backbone's by default, as in the paper.
        context_scale: Range of the context block's area as a fraction of the image.
        target_scale: Range of a target block's area as a fraction of the image.
        target_aspect_ratio: Range of a target block's height over width.
        num_targets: Target blocks per image.
        min_keep: Every block keeps more patches than this.
        crop_scale: Range of the random crop's area as a fraction of the image.
        hflip_prob: Probability of a horizontal flip; the authors do not flip.
        base_lr: Learning rate per 256 images of the global batch.
        min_lr: Learning rate at the end of the cosine.
        weight_decay: AdamW weight decay of matrices; biases, norms and LayerScale have none.
        final_weight_decay: Weight decay at the end of its own cosine.
        betas: AdamW betas.
        clip_grad_norm: Largest norm of the gradient (without the probe's); 0, as in the paper, turns clipping off.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.masked.MaskedMethod` and
            :class:`~nepa_plugin.methods.momentum.MomentumMethod`.

    Raises:
        ValueError: If the blocks do not fit the grid of patches, or as in these two.
    """

    exported = "teacher_backbone"
    transform_class = IJEPATransform
    title = "I-JEPA"

    def __init__(
        self,
        *args: Any,
        predictor_dim: PositiveInt = 384,
        predictor_depth: PositiveInt = 6,
        predictor_num_heads: PositiveInt | None = None,
        context_scale: Scale = (0.85, 1.0),
        target_scale: Scale = (0.15, 0.2),
        target_aspect_ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 1.5),
        num_targets: PositiveInt = 4,
        min_keep: PositiveInt = 10,
        crop_scale: Scale = (0.3, 1.0),
        hflip_prob: Fraction = 0.0,
        base_lr: LearningRate = 1.25e-4,
        min_lr: LearningRate = 1e-6,
        weight_decay: NonNegativeFloat = 0.04,
        final_weight_decay: NonNegativeFloat | None = 0.4,
        betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.999),
        clip_grad_norm: NonNegativeFloat = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args,
            crop_scale=crop_scale,
            hflip_prob=hflip_prob,
            base_lr=base_lr,
            min_lr=min_lr,
            weight_decay=weight_decay,
            final_weight_decay=final_weight_decay,
            betas=betas,
            clip_grad_norm=clip_grad_norm,
            **kwargs,
        )
        vit = self.backbone
        self.masks = BlockMasks(
            vit.patch_embed.grid_size[0], context_scale, target_scale, target_aspect_ratio, num_targets, min_keep
        )
        self.predictor = IJEPAPredictorTIMM(
            num_patches=vit.patch_embed.num_patches,
            depth=predictor_depth,
            mlp_dim=vit.embed_dim,
            predictor_embed_dim=predictor_dim,
            num_heads=vit.blocks[0].attn.num_heads if predictor_num_heads is None else predictor_num_heads,
        )

    def step(self, views: list[Tensor], masks: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return the prediction loss of the one view (B, C, H, W), and the momentum encoder's features (B, D)."""
        images = views[0]
        context, blocks = self.drawn_masks(images, masks)
        targets = list(blocks.unbind(dim=1))
        with torch.no_grad():
            tokens = self.teacher_backbone.forward_features(images)
        loss = in_float32(F.smooth_l1_loss, self.predict(images, context, targets), self.targets(tokens, targets))
        return loss, self.pooled(tokens)

    def predict(self, images: Tensor, context: Tensor, targets: list[Tensor]) -> Tensor:
        """Predict target patches (B * targets, M, D), all images of the first block first, from context patches."""
        prefix = self.backbone.num_prefix_tokens
        encoded = masked_encoder(self.backbone).encode(images, idx_keep=with_prefix(context, prefix))
        return self.predictor(encoded[:, prefix:], context, targets)

    def targets(self, tokens: Tensor, targets: list[Tensor]) -> Tensor:
        """Return what is predicted: the momentum encoder's patches, each normalised over its features."""
        patches = tokens[:, self.backbone.num_prefix_tokens :]
        return apply_masks(F.layer_norm(patches, patches.shape[-1:]), targets)


transform = SingleView(IJEPATransform, crop_scale=(0.3, 1.0), hflip_prob=0.0)
