"""BEiT: predict the visual tokens of masked patches (arXiv 2106.08254)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightly.models.utils import normalize_mean_var, patchify
from lightly.transforms import MAETransform
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from nepa_plugin.methods.codebook import Codebook, CodebookMethod
from nepa_plugin.methods.masked import MaskedMethod, SingleView, masked_encoder
from nepa_plugin.methods.masks import BlockwiseMasks
from nepa_plugin.methods.precision import in_float32
from nepa_plugin.runtime.ranges import (
    FractionBelowOne,
    LearningRate,
    NonNegativeFloat,
    PositiveFraction,
    PositiveInt,
    Scale,
)


class BEiT(CodebookMethod, MaskedMethod):
    """BERT pre-training of Image Transformers, with k-means in place of DALL-E's tokenizer.

    Blocks of patches are replaced by a mask token, and a linear layer on the transformer's outputs names the visual
    tokens of what was there. Source: arXiv 2106.08254, section 2 and the table of hyperparameters for ImageNet-1K: 8192
    visual tokens, about 40 % masked in blocks of at least 16 patches, batch 2048, peak learning rate 1.5e-3 and lowest
    1e-5, 10 of 800 epochs of warm-up, weight decay 0.05, betas 0.9 and 0.999, gradient norm 3, stochastic depth 0.1,
    colour jitter 0.4.

    Departures: a visual token is the nearest of k-means' centres of the patches' pixels, fitted on the first batch,
    where the paper has a discrete VAE trained on 250 million images; positions are the fixed ones of the other masked
    methods here, instead of learned relative ones. LayerScale is what ``backbone_args: {init_values: 0.1}`` adds.

    Args:
        codebook_size: Visual tokens.
        norm_pix: Cluster pixels that are standardised per patch, so that ids tell textures and shapes, not brightness.
        mask_ratio: Fraction of the patches that are masked.
        min_per_block: Fewest patches of a masked block.
        color_jitter: Strength of the random changes of brightness, contrast and saturation.
        crop_scale: Range of the random crop's area as a fraction of the image.
        drop_path_rate: Stochastic depth rate.
        base_lr: Learning rate per 256 images of the global batch.
        min_lr: Learning rate at the end of the cosine.
        betas: AdamW betas.
        warmup_fraction: Linear warm-up as a fraction of all steps.
        clip_grad_norm: Largest norm of the gradient (without the probe's); 0 turns clipping off.
        ema_decay: Decay of the moving average of the weights; off, the paper has none.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.masked.MaskedMethod`.

    Raises:
        ValueError: If the masks do not fit the grid of patches, or as there.
    """

    transform_class = MAETransform
    title = "BEiT"

    def __init__(
        self,
        *args: Any,
        codebook_size: PositiveInt = 8192,
        norm_pix: bool = True,
        mask_ratio: PositiveFraction = 0.4,
        min_per_block: PositiveInt = 16,
        color_jitter: NonNegativeFloat = 0.4,
        crop_scale: Scale = (0.08, 1.0),
        drop_path_rate: FractionBelowOne = 0.1,
        base_lr: LearningRate = 1.875e-4,
        min_lr: LearningRate = 1e-5,
        betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.999),
        warmup_fraction: FractionBelowOne = 0.0125,
        clip_grad_norm: NonNegativeFloat = 3.0,
        ema_decay: FractionBelowOne | None = 0.0,
        **kwargs: Any,
    ) -> None:
        self.color_jitter = color_jitter
        super().__init__(
            *args,
            crop_scale=crop_scale,
            drop_path_rate=drop_path_rate,
            base_lr=base_lr,
            min_lr=min_lr,
            betas=betas,
            warmup_fraction=warmup_fraction,
            clip_grad_norm=clip_grad_norm,
            ema_decay=ema_decay,
            **kwargs,
        )
        vit = self.backbone
        grid = vit.patch_embed.grid_size[0]
        if not min_per_block <= int(mask_ratio * grid**2) < grid**2:
            raise ValueError(
                f"mask_ratio={mask_ratio} of {grid**2} patches must leave some and mask at least min_per_block="
                f"{min_per_block}: lower min_per_block or change mask_ratio."
            )
        self.masks = BlockwiseMasks(grid, mask_ratio, min_per_block)
        self.norm_pix = norm_pix
        self.patch_pixels = vit.patch_embed.patch_size[0]
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.embed_dim))
        self.codebook = Codebook(codebook_size, 3 * self.patch_pixels**2)
        self.head = nn.Linear(vit.embed_dim, codebook_size)
        for weight in (self.mask_token, self.head.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def train_transform(self) -> Callable[[Image.Image], list[Tensor]]:
        """Return the authors' augmentation at this model's image size."""
        view = SingleView(self.transform_class, self.img_size, self.crop_scale, self.hflip_prob, self.normalize)
        return view.with_color_jitter(self.color_jitter)

    @torch.no_grad()
    def vectors(self, images: Tensor) -> Tensor:
        """Return every patch's pixels (B, N, 3 * patch_size ** 2) of images (B, 3, H, W), standardised if asked for."""
        pixels = patchify(images, self.patch_pixels)
        return normalize_mean_var(pixels) if self.norm_pix else pixels

    def step(self, views: list[Tensor], masks: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return the prediction loss of the one view (B, C, H, W), and its features (B, D)."""
        images, prefix = views[0], self.backbone.num_prefix_tokens
        mask, masked = self.drawn_masks(images, masks)
        encoder = masked_encoder(self.backbone, self.mask_token)
        tokens = encoder.encode(images, mask=torch.cat([mask.new_zeros(len(images), prefix), mask], dim=1))
        logits = self.head(tokens[:, prefix:].flatten(0, 1)[masked])
        ids = self.codebook(self.vectors(images).flatten(0, 1)[masked])
        return in_float32(F.cross_entropy, logits, ids), self.pooled(tokens)


transform = SingleView(MAETransform, crop_scale=(0.08, 1.0)).with_color_jitter(0.4)
