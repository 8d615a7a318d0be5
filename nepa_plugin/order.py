"""The order in which the patches of an image are read. It decides what causal means; a patch's position stays its own.

An order is a permutation: its k-th number is the index, in raster order, of the patch that is read k-th.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache
from random import Random
from typing import Any, TypeVar

import torch
from timm.models._input import update_model_args
from torch import Tensor, nn

Cell = tuple[int, int]  # (row, column)
Model = TypeVar("Model", bound="PatchOrder")


def _raster(rows: int, columns: int) -> Iterator[Cell]:
    return ((row, column) for row in range(rows) for column in range(columns))


def _reversed(rows: int, columns: int) -> Iterator[Cell]:
    return reversed(list(_raster(rows, columns)))


def _serpentine(rows: int, columns: int) -> Iterator[Cell]:
    for row in range(rows):
        for column in range(columns) if row % 2 == 0 else reversed(range(columns)):
            yield row, column


def _columns(rows: int, columns: int) -> Iterator[Cell]:
    return ((row, column) for column in range(columns) for row in range(rows))


def _spiral_in(rows: int, columns: int) -> Iterator[Cell]:
    top, left, bottom, right = 0, 0, rows - 1, columns - 1
    while top <= bottom and left <= right:
        yield from ((top, column) for column in range(left, right + 1))
        yield from ((row, right) for row in range(top + 1, bottom + 1))
        if top < bottom:
            yield from ((bottom, column) for column in reversed(range(left, right)))
        if left < right:
            yield from ((row, left) for row in reversed(range(top + 1, bottom)))
        top, left, bottom, right = top + 1, left + 1, bottom - 1, right - 1


def _spiral_out(rows: int, columns: int) -> Iterator[Cell]:
    return reversed(list(_spiral_in(rows, columns)))


def _hilbert(rows: int, columns: int) -> Iterator[Cell]:
    """Walk a curve like Hilbert's through a grid of any size.

    Consecutive patches share a side, in every grid up to 64x64 (tested): of the two ways to lay the curve, along the
    rows or down the columns, one has no step over a corner. Source of the construction: J. Červený's generalised
    Hilbert curve, 2018.
    """
    along_rows = list(_walk(0j, complex(columns, 0), complex(0, rows)))
    down_columns = list(_walk(0j, complex(0, rows), complex(columns, 0)))
    path = min((along_rows, down_columns) if columns >= rows else (down_columns, along_rows), key=_corners)
    return ((int(place.imag), int(place.real)) for place in path)


def _corners(path: list[complex]) -> int:
    return sum(abs(b - a) > 1 for a, b in itertools.pairwise(path))


def _walk(start: complex, along: complex, across: complex) -> Iterator[complex]:
    """Walk through a rectangle: begin at its corner ``start`` and end at the other end of the side ``along``."""
    length, width = round(abs(along)), round(abs(across))
    step, side = along / length, across / width
    if width == 1:
        yield from (start + i * step for i in range(length))
    elif length == 1:
        yield from (start + i * side for i in range(width))
    elif 2 * length > 3 * width:  # long: one half after the other
        half = _half(length) * step
        yield from _walk(start, half, across)
        yield from _walk(start + half, along - half, across)
    else:  # over to the other side, along, and back
        turn, half = _half(width) * side, length // 2 * step
        yield from _walk(start, turn, half)
        yield from _walk(start + turn, along, across - turn)
        yield from _walk(start + along - step + turn - side, -turn, half - along)


def _half(length: int) -> int:
    """Return half of a side, even where it can be: a part of even length ends beside where it began."""
    half = length // 2
    return half + 1 if half % 2 and length > 2 else half


_PATHS: dict[str, Callable[[int, int], Iterator[Cell]]] = {
    "raster": _raster,
    "reversed": _reversed,
    "serpentine": _serpentine,
    "columns": _columns,
    "hilbert": _hilbert,
    "spiral_in": _spiral_in,
    "spiral_out": _spiral_out,
}
#: The orders by name; ``"random:SEED"`` is a fixed one, ``"random"`` a new one for every image in training.
PATCH_ORDERS = (*_PATHS, "random")


def check_order(order: str) -> None:
    """Raise ``ValueError`` if there is no order of this name."""
    kind, colon, seed = order.partition(":")
    if order in PATCH_ORDERS or (kind == "random" and colon and seed.isdecimal()):
        return
    raise ValueError(f"order={order!r}: choose one of {', '.join(PATCH_ORDERS)}, or random:SEED.")


@lru_cache
def patch_order(order: str, rows: int, columns: int) -> tuple[int, ...]:
    """Return the raster index of every patch of a grid, in the order in which they are read.

    Args:
        order: A name. Of ``"random"``, which is drawn anew for every image in training, the one of seed 0.
        rows: Rows of the grid.
        columns: Columns of the grid.

    Raises:
        ValueError: If there is no such order.
    """
    check_order(order)
    kind, _, seed = order.partition(":")
    if kind == "random":
        drawn = list(range(rows * columns))
        Random(int(seed or 0)).shuffle(drawn)
        return tuple(drawn)
    return tuple(row * columns + column for row, column in _PATHS[kind](rows, columns))


def in_order(tokens: Tensor, order: Tensor) -> Tensor:
    """Return patch tokens (B, N, ...) or (N, ...) in an order (N,), or (B, N) of each image its own."""
    if order.ndim == 1:
        return tokens.index_select(tokens.ndim - 2, order)
    tokens = tokens.expand(len(order), *tokens.shape[-2:])
    return tokens.gather(1, order[:, :, None].expand_as(tokens))


def seen_mask(order: Tensor, prefix: int) -> Tensor:
    """Return which tokens may attend to which, True where they may: those that are read no later.

    Args:
        order: (N,), or (B, N) of each image its own.
        prefix: Tokens before the patches, which are read first.

    Returns:
        (T, T), or (B, 1, T, T), with the patches in raster order.
    """
    rank = torch.nn.functional.pad(order.argsort(dim=-1) + prefix, (prefix, 0))
    rank[..., :prefix] = torch.arange(prefix, device=order.device)
    mask = rank[..., :, None] >= rank[..., None, :]
    return mask if order.ndim == 1 else mask[:, None]


class PatchOrder(nn.Module):
    """What a Vision Transformer needs to read its patches in an order. Its own class goes on below it.

    Inside of :meth:`~nepa_plugin.predictor.NepaViT.predict_next` the tokens stand as they are read, so that the kernel
    is causal; everywhere else they stand in raster order, and a mask says what is seen.
    """

    order: str
    attention: str
    num_prefix_tokens: int
    patch_embed: Any
    _own_order: Tensor | None

    @property
    def is_causal(self) -> bool:
        """Whether attention is causal in the model's current mode."""
        return self.attention == "causal"

    def set_order(self: Model, order: str) -> Model:
        """Switch the order in which a built model reads the patches; the weights stay as they are.

        Args:
            order: As the constructor takes it.

        Returns:
            The model itself.

        Raises:
            ValueError: If there is no such order.
        """
        check_order(order)
        self.order = order
        own = self._order_of(self.patch_embed.grid_size)
        self._own_order = own if own is None else own.to(self.patch_embed.proj.weight.device)
        update_model_args(self, order=order)  # so that an exported folder rebuilds this order
        return self

    def _order_of(self, grid: tuple[int, int]) -> Tensor | None:
        """Return the order (N,) of the patches of a grid; nothing where it is the raster's."""
        return None if self.order == "raster" else torch.tensor(patch_order(self.order, *grid))

    def _drawn_order(self, batch: int, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        """Return the order (N,) or (B, N) of a forward pass; nothing where it is the raster's."""
        if self.order == "random" and self.training:
            return torch.rand(batch, grid[0] * grid[1], device=device).argsort(dim=1)
        if grid == tuple(self.patch_embed.grid_size):
            own: Tensor | None = self._own_order
            return own
        order = self._order_of(grid)
        return order if order is None else order.to(device)

    def _attention(self, images: Tensor, attn_mask: Tensor | None, is_causal: bool | None) -> dict[str, Any]:
        """Return the attention's arguments of a pass over images with their patches in raster order."""
        causal = self.is_causal if is_causal is None else is_causal
        if causal and self.training and self.patch_drop is not None:  # timm leaves the rest in a random order
            raise ValueError("Causal attention needs every patch: build the model with patch_drop_rate=0.")
        if not causal or self.order == "raster":
            return {"attn_mask": attn_mask, "is_causal": causal}
        if attn_mask is not None:
            raise ValueError(f"attn_mask: causal attention in {self.order} order has a mask of its own.")
        grid = self.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
        order = self._drawn_order(len(images), grid, images.device)
        assert order is not None
        return {"attn_mask": seen_mask(order, self.num_prefix_tokens), "is_causal": False}

    def last_token(self, tokens: Tensor) -> Tensor:
        """Return the token (B, D), of tokens (B, T, D) in raster order, that causal attention lets see all others.

        Raises:
            ValueError: If the order is not the raster's, and the tokens are not those of the model's own image size.
        """
        if self.order == "raster" or not self.is_causal:
            return tokens[:, -1]
        rows, columns = self.patch_embed.grid_size
        if tokens.shape[1] != self.num_prefix_tokens + rows * columns:
            raise ValueError(f"The last token in {self.order} order is known at {rows} x {columns} patches alone.")
        return tokens[:, self.num_prefix_tokens + patch_order(self.order, rows, columns)[-1]]

    def _patches_in(self, order: Tensor, tokens: Any) -> Any:
        """Return tokens, or position embeddings, with or without the class token, with the patches in another order."""
        if tokens is None:
            return None
        prefix = tokens.shape[1] - order.shape[-1]
        patches = in_order(tokens[:, prefix:], order)
        return torch.cat([tokens[:, :prefix].expand(len(patches), -1, -1), patches], dim=1)
