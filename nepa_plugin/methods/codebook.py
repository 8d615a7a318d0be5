"""A fixed tokenizer: the nearest of K centres, which k-means finds once, before the first step."""

from typing import Any

import torch
from torch import Tensor, nn

from nepa_plugin.methods.base import Batch, Method


class Codebook(nn.Module):
    """Ids of vectors: which of K centres is nearest. The centres are random until they are fitted, and not trained.

    Args:
        size: Number of centres, K.
        dim: Length of a vector, D.
    """

    centers: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("centers", torch.randn(size, dim))

    @torch.no_grad()
    def forward(self, vectors: Tensor) -> Tensor:
        """Return the ids (...) of vectors (..., D), in float32 also under autocast."""
        with torch.autocast(device_type=vectors.device.type, enabled=False):
            centers = self.centers.float()
            # |v - c|^2 without |v|^2, which is the same for all centres
            return (centers.square().sum(dim=1) / 2 - vectors.float() @ centers.T).argmin(dim=-1)

    def fitted(self, vectors: Tensor, seed: int = 0) -> Tensor:
        """Return the centres (K, D), on the CPU, that k-means finds among vectors (N, D), by its own random numbers.

        Raises:
            ValueError: If there are fewer vectors than centres.
        """
        size = len(self.centers)
        if len(vectors) < size:
            raise ValueError(
                f"A codebook of {size} needs as many vectors, but the first batch of a device has {len(vectors)}: "
                "lower codebook_size or raise batch_size_per_device."
            )
        from sklearn.cluster import MiniBatchKMeans  # a tenth of what a training imports, and two methods need it

        kmeans = MiniBatchKMeans(size, batch_size=max(1024, 2 * size), n_init=1, random_state=seed)
        centers = kmeans.fit(vectors.float().cpu().numpy()).cluster_centers_
        return torch.as_tensor(centers)


class CodebookMethod(Method):
    """Base of the methods that predict ids of a codebook. It is fitted on the first batch of the first process.

    Subclasses set ``codebook`` in their constructor and implement ``vectors``.
    """

    codebook: Codebook

    def vectors(self, images: Tensor) -> Tensor:
        """Return what the codebook quantises, (..., D), of images (B, C, H, W)."""
        raise NotImplementedError

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Fit the codebook before the first step; a resumed run has it in its checkpoint.

        Raises:
            ValueError: If the first batch has too little for it.
        """
        super().on_train_batch_start(batch, batch_idx)
        if self.global_step or batch_idx:
            return
        views: Any = batch[0]
        vectors = self.vectors(views if isinstance(views, Tensor) else views[0]).flatten(0, -2)
        # sent from memory of the host: what lies on one device is no good to the others
        centers = self.codebook.fitted(vectors) if self.trainer.is_global_zero else self.codebook.centers.cpu()
        self.codebook.centers.copy_(self.trainer.strategy.broadcast(centers))
