"""MAE: reconstruct the pixels of masked patches from the visible ones (arXiv 2111.06377)."""

from typing import Any, Literal

import torch
from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM
from lightly.models.modules.masked_vision_transformer_timm import init_weights
from lightly.models.utils import (
    get_at_index,
    normalize_mean_var,
    patchify,
    random_token_mask,
    repeat_token,
    set_at_index,
)
from lightly.transforms import MAETransform
from torch import Tensor, nn
from torch.nn import functional as F

from nepa_plugin.methods.masked import MaskedMethod, SingleView, check_maskable, masked_encoder, with_prefix
from nepa_plugin.methods.precision import in_float32
from nepa_plugin.runtime.ranges import FractionBelowOne, LearningRate, NonNegativeFloat, PositiveInt


class MAE(MaskedMethod):
    """Masked Autoencoder with the paper's recipe as defaults.

    The encoder sees the visible patches only; a light decoder gets its outputs and mask tokens and predicts the pixels
    of the masked patches. Source: arXiv 2111.06377, section 3 and table 8; decoder of table 1: 8 blocks of width 512.
    The backbone starts from the paper's initialisation, unless ``init_from`` gives it weights.

    Args:
        mask_ratio: Fraction of the patches that are masked.
        norm_pix_loss: Predict pixels that are standardised per patch.
        decoder_dim: Width of the decoder.
        decoder_depth: Blocks of the decoder.
        decoder_num_heads: Attention heads of the decoder.
        pool: What one feature per image is; the paper's linear probe reads the ``"class"`` token.
        base_lr: Learning rate per 256 images of the global batch.
        clip_grad_norm: Largest norm of the gradient (without the probe's); 0, as in the paper, turns clipping off.
        ema_decay: Decay of the moving average of the weights; off, the paper has none.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.masked.MaskedMethod`.

    Raises:
        ValueError: If no patch is masked, or none is visible, or as there.
    """

    transform_class = MAETransform
    title = "MAE"

    def __init__(
        self,
        *args: Any,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        decoder_dim: PositiveInt = 512,
        decoder_depth: PositiveInt = 8,
        decoder_num_heads: PositiveInt = 16,
        pool: Literal["mean", "class"] = "class",
        base_lr: LearningRate = 1.5e-4,
        clip_grad_norm: NonNegativeFloat = 0.0,
        ema_decay: FractionBelowOne | None = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args, pool=pool, base_lr=base_lr, clip_grad_norm=clip_grad_norm, ema_decay=ema_decay, **kwargs
        )
        vit = self.backbone
        patches = vit.patch_embed.num_patches
        if not 0 < int(patches * (1 - mask_ratio)) < patches:
            raise ValueError(f"mask_ratio={mask_ratio} of {patches} patches must leave some visible and mask some.")
        self.mask_ratio = mask_ratio
        self.norm_pix_loss = norm_pix_loss
        self.patch_pixels = vit.patch_embed.patch_size[0]
        self.decoder_embed = nn.Linear(vit.embed_dim, decoder_dim)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=patches,
            embed_dim=decoder_dim,
            depth=decoder_depth,
            num_heads=decoder_num_heads,
            num_prefix_tokens=vit.num_prefix_tokens,
        )
        self.decoder_pred = nn.Linear(decoder_dim, 3 * self.patch_pixels**2)
        init_weights(self.decoder_embed)
        init_weights(self.decoder_pred)

    def prepare_backbone(self, loaded: bool) -> None:
        """Draw the weights as the paper does, too."""
        check_maskable(self.backbone, self.title)
        if not loaded:
            MaskedVisionTransformerTIMM(self.backbone, pos_embed_initialization="skip")  # in place
        super().prepare_backbone(loaded)

    def step(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the reconstruction loss of the one view (B, C, H, W), and features (B, D) of its visible patches."""
        images = views[0]
        size = len(images), self.backbone.patch_embed.num_patches
        keep, masked = random_token_mask(size, self.mask_ratio, mask_class_token=True, device=images.device)
        encoded = masked_encoder(self.backbone).encode(
            images, idx_keep=with_prefix(keep, self.backbone.num_prefix_tokens)
        )
        loss = in_float32(F.mse_loss, self.reconstruct(encoded, keep, masked), self.targets(images, masked))
        return loss, self.pooled(encoded)

    def reconstruct(self, encoded: Tensor, keep: Tensor, masked: Tensor) -> Tensor:
        """Predict the masked patches' pixels.

        Args:
            encoded: Prefix tokens and visible patches, (B, P + V, D).
            keep: Indices of the visible patches, (B, V).
            masked: Indices of the masked patches, (B, M).

        Returns:
            Pixels (B, M, 3 * patch_size ** 2).
        """
        prefix = self.backbone.num_prefix_tokens
        embedded = self.decoder_embed(encoded)
        tokens = repeat_token(self.decoder.mask_token, (len(encoded), self.decoder.sequence_length))
        tokens = set_at_index(tokens.to(embedded.dtype), with_prefix(keep, prefix), embedded)
        return self.decoder_pred(get_at_index(self.decoder(tokens), masked + prefix))

    @torch.no_grad()
    def targets(self, images: Tensor, masked: Tensor) -> Tensor:
        """Return what is predicted: pixels (B, M, 3 * patch_size ** 2) of the masked patches of (B, C, H, W)."""
        pixels = get_at_index(patchify(images, self.patch_pixels), masked)
        return normalize_mean_var(pixels) if self.norm_pix_loss else pixels


transform = SingleView(MAETransform)
