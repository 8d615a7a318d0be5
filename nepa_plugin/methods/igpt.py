"""iGPT: predict the colours of the next pixels, as ids of a palette, under a causal mask (Chen et al., ICML 2020)."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from nepa_plugin.data.transforms import NEPATransform
from nepa_plugin.methods.causal import CausalMethod
from nepa_plugin.methods.codebook import Codebook, CodebookMethod
from nepa_plugin.methods.precision import in_float32
from nepa_plugin.runtime.ranges import Fraction, FractionBelowOne, LearningRate, NonNegativeFloat, PositiveInt, Scale


class IGPT(CodebookMethod, CausalMethod):
    """Image GPT's objective, patch by patch, on NEPA's backbone.

    The image is averaged to few pixels, and each of these is the id of the nearest of 512 colours, found by k-means. A
    causal transformer predicts them. Source: Chen et al., "Generative Pretraining from Pixels", ICML 2020, sections 2
    and 3 and appendix: palette, Adam without weight decay, learning rate 3e-3 at a batch of 128 (iGPT-S and M), one of
    100 epochs of warm-up, logits that start at zero, and shorter sides of 256 to 384 pixels cropped to 224, of which
    ``crop_scale`` is the area. With patches of 14 and 2x2 pixels in each, 224 pixels become the paper's 32x32.

    Departures: there, every pixel is a token. Here a token is a patch, as the other methods here have it, and predicts
    all pixels of the next patch at once, each without seeing the others. The palette is fitted on the first batch. The
    gradient is clipped and the weights are averaged as in NEPA's recipe; the paper names neither.

    Args:
        codebook_size: Colours of the palette.
        pixels: Pixels along a side of each patch, after averaging.
        crop_scale: Range of the random crop's area as a fraction of the image.
        hflip_prob: Probability of a horizontal flip.
        base_lr: Learning rate per 256 images of the global batch.
        weight_decay: AdamW weight decay.
        warmup_fraction: Linear warm-up as a fraction of all steps.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.causal.CausalMethod`.

    Raises:
        ValueError: If the backbone is not a ``nepa_vit_*`` model, or ``pixels`` does not divide its patches.
    """

    title = "iGPT"

    def __init__(
        self,
        *args: Any,
        codebook_size: PositiveInt = 512,
        pixels: PositiveInt = 2,
        crop_scale: Scale = (0.34, 0.77),
        hflip_prob: Fraction = 0.0,
        base_lr: LearningRate = 6e-3,
        weight_decay: NonNegativeFloat = 0.0,
        warmup_fraction: FractionBelowOne = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args,
            crop_scale=crop_scale,
            hflip_prob=hflip_prob,
            base_lr=base_lr,
            weight_decay=weight_decay,
            warmup_fraction=warmup_fraction,
            **kwargs,
        )
        patch = self.backbone.patch_embed.patch_size
        if any(side % pixels for side in patch):
            raise ValueError(f"pixels={pixels} must divide the patches' sides, {patch[0]}x{patch[1]}.")
        self.pixels = pixels
        self.codebook = Codebook(codebook_size, 3)
        self.head = nn.Linear(self.backbone.embed_dim, pixels**2 * codebook_size)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def vectors(self, images: Tensor) -> Tensor:
        """Return the averaged colours (B, N, pixels ** 2, 3) of images (B, 3, H, W), patch by patch in raster order."""
        height, width = self.backbone.patch_embed.grid_size
        small = F.adaptive_avg_pool2d(images, (height * self.pixels, width * self.pixels))
        cells = small.view(len(images), 3, height, self.pixels, width, self.pixels)
        return cells.permute(0, 2, 4, 3, 5, 1).reshape(len(images), height * width, self.pixels**2, 3)

    def step(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the prediction loss of the one view (B, C, H, W), and its features (B, D)."""
        ids = self.codebook(self.vectors(views[0]))
        _, outputs = self.backbone.predict_next(views[0])
        before = outputs[:, self.backbone.num_prefix_tokens - 1 : -1]  # the class token begins the sequence
        logits = self.head(before).unflatten(-1, (self.pixels**2, -1))
        return in_float32(F.cross_entropy, logits.flatten(0, 2), ids.flatten()), self.pooled(outputs)


transform = NEPATransform(scale=(0.34, 0.77), hflip_prob=0.0)
