"""AIM: predict the pixels of the next patch under a causal mask with a bidirectional prefix (arXiv 2401.08541)."""

from collections.abc import Callable
from typing import Any

import torch
from lightly.models.modules import AIMPredictionHead
from lightly.models.utils import normalize_mean_var, patchify, random_prefix_mask
from lightly.transforms import AIMTransform
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from nepa_plugin.methods.base import Method
from nepa_plugin.methods.masked import SingleView, check_maskable, fix_position_embedding


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


class AIM(Method):
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
        hflip_prob: Probability of a horizontal flip.
        backbone: Name of a timm ``VisionTransformer``.
        init_from: As in :class:`~nepa_plugin.methods.base.Method`.
        base_lr: As in the base.
        warmup_fraction: As in the base.
        ema_decay: As in the base; the paper has no moving average.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.base.Method`.

    Raises:
        ValueError: If the backbone is no ``VisionTransformer``, or has a single patch.
    """

    def __init__(
        self,
        *args: Any,
        head_dim: int = 2048,
        head_blocks: int = 12,
        norm_pix_loss: bool = True,
        crop_scale: tuple[float, float] = (0.4, 1.0),
        hflip_prob: float = 0.5,
        backbone: str = "plain_vit_base_patch14_224",
        init_from: str | None = None,
        base_lr: float = 6.25e-5,
        warmup_fraction: float = 0.0625,
        ema_decay: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args,
            backbone=backbone,
            init_from=init_from,
            base_lr=base_lr,
            warmup_fraction=warmup_fraction,
            ema_decay=ema_decay,
            **kwargs,
        )
        vit = self.backbone
        check_maskable(vit, "AIM")
        if vit.grad_checkpointing:
            raise ValueError(
                "AIM has no grad_checkpointing: timm's ViT ignores it under an attention mask. Turn it off."
            )
        if vit.patch_embed.num_patches < 2:
            raise ValueError("AIM predicts the next patch, but the image is a single one: lower patch_size.")
        fix_position_embedding(vit, initialize=init_from is None)
        self.norm_pix_loss = norm_pix_loss
        self.crop_scale = crop_scale
        self.hflip_prob = hflip_prob
        self.patch_pixels = vit.patch_embed.patch_size[0]
        self.head = AIMPredictionHead(
            vit.embed_dim, 3 * self.patch_pixels**2, hidden_dim=head_dim, num_blocks=head_blocks
        )
        self.train_transform()  # a wrong option fails here
        self.save_hyperparameters(logger=False)

    @property
    def attention(self) -> str:
        """The attention in pretraining, in words; downstream it is bidirectional."""
        return "causal after a bidirectional prefix"

    def train_transform(self) -> Callable[[Image.Image], list[Tensor]]:
        """Return the paper's augmentation at this model's image size."""
        return SingleView(AIMTransform, self.img_size, self.crop_scale, self.hflip_prob, self.normalize)

    def step(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the prediction loss of the one view (B, C, H, W), and its features (B, D)."""
        images = views[0]
        predicted = self.draw_predicted(len(images), "cpu")
        # chosen on the CPU: on the device, a boolean index waits for all work before it
        chosen = predicted.flatten().nonzero().squeeze(1).to(images.device)
        tokens = self.tokens(images, predicted.to(images.device))
        before = tokens[:, self.backbone.num_prefix_tokens : -1].flatten(0, 1)[chosen]
        loss = F.mse_loss(self.head(before), self.targets(images)[:, 1:].flatten(0, 1)[chosen])
        return loss, self.pooled(tokens)

    def draw_predicted(self, batch_size: int, device: torch.device | str) -> Tensor:
        """Draw prefixes of 1 ... N - 1 of the N patches; return which of patches 1 ... N - 1 come after, (B, N - 1)."""
        after_first = self.backbone.patch_embed.num_patches - 1
        return random_prefix_mask((batch_size, after_first), max_prefix_length=after_first, device=device)

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
