"""Rotary position embeddings: timm's axial ones, with tables made on the device, and at any positions."""

import math

import torch
from timm.layers import RotaryEmbeddingDinoV3
from torch import Tensor

#: Distance of two neighbours on a line, or in a plane: that of patches of the published 16x16 grid, whose sides go from
#: -1 to 1.
UNIT = 2 / 16


def as_coordinates(positions: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """Return where the elements of sequences are, for RoPE along two axes.

    Args:
        positions: In patches, on a line (T,) or (B, T), or in a plane (T, 2) or (B, T, 2); by default 0, 1, 2, ...
        batch: Sequences, B.
        length: Elements of each, T.
        device: Of the result.

    Returns:
        Coordinates (T, 2) or (B, T, 2). A line is both axes: each has half of the rotated channels.

    Raises:
        ValueError: If the positions have another shape.
    """
    if positions is None:
        positions = torch.arange(length, device=device)
    shape = tuple(positions.shape)
    if shape in ((length,), (batch, length)):
        positions = positions[..., None].expand(*shape, 2)
    elif shape not in ((length, 2), (batch, length, 2)):
        wanted = f"({length},), ({batch}, {length}), ({length}, 2) or ({batch}, {length}, 2)"
        raise ValueError(f"Expected positions {wanted}, got {shape}.")
    return positions.to(device=device, dtype=torch.float32) * UNIT


class ResidentRope(RotaryEmbeddingDinoV3):
    """timm's axial RoPE, with the table of a training step made on the device.

    timm builds the patch coordinates on the CPU in every step and copies them over, and that copy makes the host wait
    until the GPU has finished the work queued before it.
    """

    _factor_seed: int | None = None
    _factors_drawn = 0
    _factor = 1.0

    def seed_factors(self, seed: int) -> None:
        """Draw the factors that rescale the coordinates from a generator of their own from now on.

        Processes whose other random numbers differ then rescale alike.

        Args:
            seed: Of that generator.
        """
        self._factor_seed, self._factors_drawn = seed, 0

    def _create_embed(self, feat_shape: list[int], no_aug: bool = False) -> Tensor:
        """Return the sine and cosine table (H * W, 2 * head_dim) of a grid of (H, W) patches."""
        augmented = not no_aug and self.training and self.aug_active
        if augmented and self._factor_seed is not None:
            self._factor, no_aug = self._seeded_factor(self._factor_seed), True
        try:
            with self.periods.device:
                return super()._create_embed(feat_shape, no_aug)
        finally:
            self._factor = 1.0

    def _seeded_factor(self, seed: int) -> float:
        # on the CPU, and a number: as a tensor it would have to be copied over
        generator, bound = torch.Generator().manual_seed(seed), math.log(self.rescale_coords or 1.0)
        self._factors_drawn += 1
        drawn = torch.empty(self._factors_drawn).uniform_(-bound, bound, generator=generator)
        return float(drawn[-1].exp())

    def _get_pos_embed_from_coords(self, coords: Tensor) -> tuple[Tensor, Tensor]:
        """Return sine and cosine (H * W, head_dim) of the angles at coordinates (H * W, 2)."""
        return super()._get_pos_embed_from_coords(coords * self._factor)

    def table_at(self, coordinates: Tensor) -> Tensor:
        """Return the table of given coordinates; in training they are rescaled as those of a grid are.

        Args:
            coordinates: (T, 2), or (B, T, 2).

        Returns:
            Sines and cosines (T, 2 * head_dim), or (B, 1, T, 2 * head_dim).
        """
        flat = coordinates.flatten(0, -2)
        if self.training and self.aug_active and self.rescale_coords:
            if self._factor_seed is not None:
                flat = flat * self._seeded_factor(self._factor_seed)
            else:
                bound = math.log(self.rescale_coords)
                flat = flat * torch.empty(1, device=flat.device).uniform_(-bound, bound).exp()
        table = torch.cat(self._get_pos_embed_from_coords(flat), dim=-1)
        return table if coordinates.ndim == 2 else table.view(*coordinates.shape[:2], -1)[:, None]
