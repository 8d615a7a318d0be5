"""Pixels from patch embeddings: a small network that is fitted to a frozen patch embedding, to see what it says."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from nepa_plugin.predictor import NepaViT

#: Patches that the decoder is fitted to, at most.
PATCHES = 20_000
HIDDEN = 256


def patch_pixels(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the pixels of every patch (B, N, C * h * w), in raster order, of images (B, C, H, W)."""
    rows, columns = grid
    parts = images.unflatten(2, (rows, -1)).unflatten(4, (columns, -1))  # (B, C, rows, h, columns, w)
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def joined(pixels: Tensor, grid: tuple[int, int], channels: int, height: int) -> Tensor:
    """Return images (B, C, H, W) of patches' pixels (B, N, C * h * w), in raster order; ``height`` is H."""
    rows, columns = grid
    parts = pixels.unflatten(2, (channels, height // rows, -1)).unflatten(1, (rows, columns))
    return parts.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class PixelDecoder:
    """One hidden layer from the direction of an embedding to the pixels of its patch, by scikit-learn.

    Of an embedding only the direction is read, since the loss is a cosine and predictions have no length of their own.

    Args:
        model: The predictor whose patch embedding is decoded.
        images: Normalised images (B, C, H, W) to fit to; a tenth of their patches is held out to know when to stop.
        seed: Of the patches that are taken and of the weights.
    """

    def __init__(self, model: NepaViT, images: Tensor, seed: int = 0) -> None:
        from sklearn.neural_network import MLPRegressor

        self.grid = model.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
        self.channels, self.height = images.shape[1], images.shape[2]
        with torch.inference_mode():
            embeddings = model.embed(images)[:, model.num_prefix_tokens :]
        inputs, targets = self._inputs(embeddings).flatten(0, 1), patch_pixels(images, self.grid).flatten(0, 1)
        chosen = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))[:PATCHES]
        self.network: Any = MLPRegressor(
            hidden_layer_sizes=(HIDDEN,), early_stopping=True, random_state=seed, max_iter=200
        )
        self.network.fit(inputs[chosen].numpy(), targets[chosen].numpy())

    @staticmethod
    def _inputs(embeddings: Tensor) -> Tensor:
        # numbers of about one, as the fit expects
        return normalize(embeddings.float(), dim=-1).cpu() * embeddings.shape[-1] ** 0.5

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Return images (B, C, H, W), normalised as those of the fit, of embeddings (B, N, D) in raster order."""
        flat = self._inputs(embeddings).flatten(0, 1).numpy()
        pixels = torch.from_numpy(self.network.predict(flat)).float().unflatten(0, (len(embeddings), -1))
        return joined(pixels, self.grid, self.channels, self.height)
