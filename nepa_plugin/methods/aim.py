"""AIM: predict the pixels of the next patch under a causal mask with a bidirectional prefix (arXiv 2401.08541)."""

from collections.abc import Sequence
from typing import Any

import torch
from lightly.models.modules import AIMPredictionHead
from lightly.models.utils import normalize_mean_var, patchify
from lightly.transforms import AIMTransform
from torch import Tensor
from torch.nn import functional as F

from nepa_plugin.methods.masked import MaskedMethod, SingleView
from nepa_plugin.methods.masks import PrefixMasks
from nepa_plugin.methods.precision import in_float32
from nepa_plugin.runtime.ranges import FractionBelowOne, LearningRate, PositiveInt, Scale


def prefix_attention(causal: Tensor) -> Tensor:
    """Return who may attend to whom: all tokens to the prefix, and each token to those before it and to itself.

    Args:
        causal: Whether a token comes after the prefix, (B, T).

    Returns:
        True where the query (row) attends to the key (column), (B, 1, T, T).
    """
    tokens = causal.shape[1]
    before = torch.ones(tokens, tokens, dtype=torch.bool, device=causal.device).tril()
    return (before | ~causal[:, None, :])[:, None]


class AIM(MaskedMethod):
    """Autoregressive Image Model with the paper's recipe as defaults.

    Patches in raster order; each output after a prefix of random length predicts the standardised pixels of the patch
    that follows. Downstream, attention is bidirectional, so the backbone is an ordinary ViT. The paper has no class
    token: a backbone's class token is part of the prefix here (``backbone_args: {class_token: false, global_pool:
    avg}`` leaves it out).

    Source: arXiv 2401.08541, section 3 and the appendix's table of pretraining hyperparameters: batch 4096, peak
    learning rate 1e-3, 31,250 of 500,000 steps of warm-up, weight decay 0.05, gradient norm 1. The paper's smallest
    model has 0.6 billion parameters; there is no published recipe for ViT-B, so these are its numbers.

    Args:
        head_dim: Width of the MLP that predicts pixels.
        head_blocks: Residual blocks of that MLP.
        norm_pix_loss: Predict pixels that are standardised per patch.
        crop_scale: Range of the random crop's area as a fraction of the image.
        base_lr: Learning rate per 256 images of the global batch.
        warmup_fraction: Linear warm-up as a fraction of all steps.
        ema_decay: Decay of the moving average of the weights; off, the paper has none.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.masked.MaskedMethod`.

    Raises:
        ValueError: If the backbone has a single patch or ``grad_checkpointing``, or as there.
    """

    transform_class = AIMTransform
    title = "AIM"

    def __init__(
        self,
        *args: Any,
        head_dim: PositiveInt = 2048,
        head_blocks: PositiveInt = 12,
        norm_pix_loss: bool = True,
        crop_scale: Scale = (0.4, 1.0),
        base_lr: LearningRate = 6.25e-5,
        warmup_fraction: FractionBelowOne = 0.0625,
        ema_decay: FractionBelowOne | None = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args,
            crop_scale=crop_scale,
            base_lr=base_lr,
            warmup_fraction=warmup_fraction,
            ema_decay=ema_decay,
            **kwargs,
        )
        self.norm_pix_loss = norm_pix_loss
        self.masks = PrefixMasks(self.backbone.patch_embed.num_patches)
        self.patch_pixels = self.backbone.patch_embed.patch_size[0]
        self.head = AIMPredictionHead(
            self.backbone.embed_dim, 3 * self.patch_pixels**2, hidden_dim=head_dim, num_blocks=head_blocks
        )

    def prepare_backbone(self, loaded: bool) -> None:
        """Check what else the prediction of the next patch needs."""
        super().prepare_backbone(loaded)
        if self.backbone.grad_checkpointing:
            raise ValueError(
                "AIM has no grad_checkpointing: timm's ViT ignores it under an attention mask. Turn it off."
            )
        if self.backbone.patch_embed.num_patches < 2:
            raise ValueError("AIM predicts the next patch, but the image is a single one: lower patch_size.")

    @property
    def attention(self) -> str:
        """The attention in pretraining, in words; downstream it is bidirectional."""
        return "causal after a bidirectional prefix"

    def step(self, views: list[Tensor], masks: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return the prediction loss of the one view (B, C, H, W), and its features (B, D)."""
        images = views[0]
        predicted, chosen = self.drawn_masks(images, masks)
        tokens = self.tokens(images, predicted)
        before = tokens[:, self.backbone.num_prefix_tokens : -1].flatten(0, 1)[chosen]
        loss = in_float32(F.mse_loss, self.head(before), self.targets(images)[:, 1:].flatten(0, 1)[chosen])
        return loss, self.pooled(tokens)

    def tokens(self, images: Tensor, predicted: Tensor) -> Tensor:
        """Return the backbone's tokens (B, T, D) under the prefix attention that goes with ``predicted``."""
        prefix = predicted.new_zeros(len(predicted), self.backbone.num_prefix_tokens + 1)  # and the first patch
        causal = torch.cat([prefix, predicted], dim=1)
        return self.backbone.forward_features(images, attn_mask=prefix_attention(causal))

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """Return every patch's pixels (B, N, 3 * patch_size ** 2), standardised where the loss wants it."""
        pixels = patchify(images, self.patch_pixels)
        return normalize_mean_var(pixels) if self.norm_pix_loss else pixels


transform = SingleView(AIMTransform, crop_scale=(0.4, 1.0))
