"""Pictures of what a predictor sees: attention, surprise, principal components, and attention in numbers by layer."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from nepa_plugin.analysis.attention import AttentionStatistics
from nepa_plugin.analysis.look import Look, PatchMap
from nepa_plugin.predictor import NEPA_MEAN, NEPA_STD

#: Of every map; near-equal values can be told apart in it, and it is read alike in grey.
COLOURS = "viridis"


def picture(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _figure(rows: int, columns: int, size: float = 2.0) -> tuple[Figure, Any]:
    figure = Figure(figsize=(size * columns + 0.9, size * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def outline(axes: Axes, patch: int, grid: tuple[int, int], size: tuple[int, int], colour: str, dashed: bool) -> None:
    """Draw the outline of a patch.

    Args:
        axes: In pixels of the image.
        patch: Its index in raster order.
        grid: (rows, columns) of patches.
        size: (height, width) of the image in pixels.
        colour: Of the line.
        dashed: Whether it is dashed.
    """
    row, column = divmod(patch, grid[1])
    height, width = size[0] / grid[0], size[1] / grid[1]
    style = "--" if dashed else "-"
    axes.add_patch(Rectangle((column * width, row * height), width, height, fill=False, ec=colour, lw=1.5, ls=style))


def heat(axes: Axes, pixels: Tensor, values: Tensor, low: float, high: float) -> Any:
    """Draw values (rows, columns) over the image (3, H, W) in grey, and return what a colour bar needs."""
    height, width = pixels.shape[1:]
    extent = (0, width, height, 0)
    axes.set_axis_off()
    axes.imshow(pixels.mean(dim=0), extent=extent, cmap="gray", vmin=0, vmax=1)
    return axes.imshow(values, extent=extent, alpha=0.75, cmap=COLOURS, vmin=low, vmax=high, interpolation="nearest")


def _plain(axes: Axes, pixels: Tensor) -> None:
    axes.set_axis_off()
    axes.imshow(pixels.permute(1, 2, 0), extent=(0, pixels.shape[2], pixels.shape[1], 0), interpolation="nearest")


def _find(one: Look, group: str, name: str) -> PatchMap:
    return next(each for each in one.maps if (each.group, each.name) == (group, name))


def plot_attention(looks: Sequence[Look], layers: Sequence[int], query: int, heads: Sequence[int] = ()) -> Figure:
    """Draw the attention of one patch: a row per image, a panel per layer, and the rollout.

    Each panel has its own scale, its largest value in the title and dashed in the picture.

    Args:
        looks: At the images.
        layers: Whose attention is drawn.
        query: The patch that attends, in raster order.
        heads: From 1, with a panel each for every layer; by default their mean.
    """
    names = {f" head {head}": f"head {head}" for head in heads} or {"": "mean of heads"}
    figure, panels = _figure(len(looks), 2 + len(layers) * len(names))
    for line, one in zip(panels, looks, strict=True):
        size = one.pixels.shape[1], one.pixels.shape[2]
        _plain(line[0], one.pixels)
        outline(line[0], query, one.grid, size, "lime", False)
        shown = [
            (f"layer {layer}{title}", _find(one, f"attention, layer {layer}", name))
            for layer in layers
            for title, name in names.items()
        ]
        shown.append((f"rollout, {layers[-1]}", _find(one, f"attention, layer {layers[-1]}", "rollout")))
        for axes, (title, each) in zip(line[1:], shown, strict=True):
            values = each.values[query].unflatten(0, one.grid)
            heat(axes, one.pixels, values, float(values.min()), float(values.max()))
            outline(axes, query, one.grid, size, "lime", False)
            outline(axes, int(values.argmax()), one.grid, size, "white", True)
            axes.set_title(f"{title}: {values.max():.2g}", fontsize=9)
    return figure


def plot_surprise(looks: Sequence[Look], scores: Mapping[str, float]) -> Figure:
    """Draw the surprise of every patch, of predicting and of copying, on one scale: a row per image."""
    figure, panels = _figure(len(looks), 3)
    for line, one in zip(panels, looks, strict=True):
        _plain(line[0], one.pixels)
        fits = len(one.name) <= 28  # more would reach into the next panel's
        line[0].set_title(one.name if fits else Path(one.name).name[:28], fontsize=8)
        both = [each for each in one.maps if each.group == "surprise"]
        known = torch.cat([each.values[each.values.isfinite()] for each in both])
        low, high = float(known.min()), float(known.max())
        titles = (f"predicted: {scores[one.name]:.3f}", f"copied: {float(both[1].values.nanmean()):.3f}")
        for axes, each, title in zip(line[1:], both, titles, strict=True):
            drawn = heat(axes, one.pixels, each.values.unflatten(0, one.grid), low, high)
            axes.set_title(title, fontsize=9)
        figure.colorbar(drawn, ax=list(line), shrink=0.8, label="1 - cosine")
    return figure


def plot_components(looks: Sequence[Look]) -> Figure:
    """Draw the images, and below them the first three principal components of their features as colours."""
    figure, panels = _figure(2, len(looks))
    for column, one in zip(panels.T, looks, strict=True):
        _plain(column[0], one.pixels)
        assert one.colours is not None
        column[1].set_axis_off()
        column[1].imshow(one.colours.permute(1, 2, 0), interpolation="nearest")
    return figure


def plot_statistics(statistics: Mapping[int, AttentionStatistics], uniform: Mapping[str, float]) -> Figure:
    """Draw distance, entropy and locality of attention by layer: a point per head, a line for their mean.

    Args:
        statistics: By layer.
        uniform: Those of attention that treats all tokens alike, which are dashed.
    """
    figure, panels = _figure(1, 3, 3.2)
    titles = {
        "distance": "mean distance, patches",
        "entropy": "entropy, nats",
        "outside": "share outside the 3x3 around",
    }
    for axes, (name, title) in zip(panels[0], titles.items(), strict=True):
        heads = {layer: getattr(each, name).cpu() for layer, each in statistics.items()}
        for layer, values in heads.items():
            axes.plot([layer] * len(values), values, "o", color="tab:blue", alpha=0.4, markersize=4)
        axes.plot(list(heads), [float(values.mean()) for values in heads.values()], color="tab:blue")
        axes.axhline(uniform[name], color="gray", linestyle="--", linewidth=1)
        axes.margins(y=0.1)
        axes.set(xlabel="layer", title=title, xticks=list(heads))
        axes.set_ylim(bottom=0)
    return figure


def plot_similarity(
    images: Tensor,
    maps: Tensor,
    queries: Sequence[int],
    path: str | Path,
    mean: Sequence[float] = NEPA_MEAN,
    std: Sequence[float] = NEPA_STD,
) -> None:
    """Draw the maps over their images: a row per image, the image first, then a panel per query.

    Each image has its own scale. The query is outlined, and dashed the patch that is nearest to what was predicted.

    Args:
        images: Normalised images (B, 3, H, W).
        maps: From :func:`~nepa_plugin.analysis.similarity.similarity_maps`, (B, Q, rows, columns).
        queries: The query patches of the maps.
        path: PNG file to write.
        mean: Mean that the images were normalised with.
        std: Standard deviation that the images were normalised with.
    """
    height, width = images.shape[-2:]
    grid: tuple[int, int] = (maps.shape[-2], maps.shape[-1])
    pixels = (images.cpu() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]).clamp(0, 1)
    figure, panels = _figure(len(images), 1 + len(queries))
    for b, line in enumerate(panels):
        low, high = float(maps[b].min()), float(maps[b].max())
        drawn = None
        for j, axes in enumerate(line):
            axes.set_axis_off()
            if j == 0:
                axes.imshow(pixels[b].permute(1, 2, 0), extent=(0, width, height, 0))
            else:
                drawn = heat(axes, pixels[b], maps[b, j - 1].cpu(), low, high)
                outline(axes, int(maps[b, j - 1].argmax()), grid, (height, width), "white", True)
            for q in queries if j == 0 else [queries[j - 1]]:
                outline(axes, q, grid, (height, width), "lime", False)
            if b == 0:
                axes.set_title("image" if j == 0 else f"patch {queries[j - 1]}", fontsize=9)
        if drawn is not None:
            figure.colorbar(drawn, ax=list(line), shrink=0.8)
    figure.suptitle("cosine of the predicted embedding (lime) to all patches; dashed: the largest", fontsize=9)
    figure.savefig(path, dpi=110)
