"""What a predictor expects to see next: cosine similarity of a predicted embedding to all patch embeddings."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from nepa_plugin.order import patch_order
from nepa_plugin.predictor import NEPA_MEAN, NEPA_STD, NepaViT


@torch.inference_mode()
def similarity_maps(model: NepaViT, images: Tensor, queries: Sequence[int]) -> Tensor:
    """Return, for each query patch, the similarity of its predicted embedding to every patch's embedding.

    The embedding of a patch is predicted from the patches that are read before it, in raster order at token q.

    Args:
        model: The predictor.
        images: Normalised images (B, C, H, W).
        queries: Indices of patches.

    Returns:
        Cosine similarities (B, Q, rows, columns).

    Raises:
        ValueError: If a query is no patch of these images.
    """
    was_training = model.training
    try:
        embeddings, predictions = model.eval().predict_next(images)
    finally:
        model.train(was_training)
    rows, columns = model.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
    places = torch.tensor(patch_order(model.order, rows, columns), device=embeddings.device).argsort()
    patches = normalize(embeddings[:, model.num_prefix_tokens :].float(), dim=-1)[:, places]
    odd = [q for q in queries if not 0 <= q < patches.shape[1]]
    if odd:
        raise ValueError(f"Query patches {odd} are not in 0..{patches.shape[1] - 1}.")
    before = model.num_prefix_tokens - 1 + places[list(queries)]  # the token that is read before the query
    predicted = normalize(predictions[:, before].float(), dim=-1)
    return (predicted @ patches.mT).unflatten(-1, (rows, columns))


def plot_similarity(
    images: Tensor,
    maps: Tensor,
    queries: Sequence[int],
    path: str | Path,
    mean: Sequence[float] = NEPA_MEAN,
    std: Sequence[float] = NEPA_STD,
) -> None:
    """Draw the maps over their images: a row per image, the image first, then a panel per query.

    Args:
        images: Normalised images (B, 3, H, W).
        maps: From :func:`similarity_maps`, (B, Q, rows, columns).
        queries: The query patches of the maps, outlined in the panels.
        path: PNG file to write.
        mean: Mean that the images were normalised with.
        std: Standard deviation that the images were normalised with.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    height, width = images.shape[-2:]
    rows, columns = maps.shape[-2:]
    patch = height / rows, width / columns
    pixels = (images.cpu() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]).clamp(0, 1)
    figure = Figure(figsize=(1.9 * (1 + len(queries)) + 0.9, 2.0 * len(images) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(images), 1 + len(queries), squeeze=False)
    heat = None
    for b, line in enumerate(grid):
        for j, axes in enumerate(line):
            axes.set_axis_off()
            axes.imshow(pixels[b].permute(1, 2, 0), extent=(0, width, height, 0))
            shown = queries if j == 0 else [queries[j - 1]]
            if j:
                extent = (0, width, height, 0)
                heat = axes.imshow(maps[b, j - 1].cpu(), extent=extent, alpha=0.7, cmap="coolwarm", vmin=-1, vmax=1)
            for q in shown:
                row, column = divmod(q, columns)
                corner = column * patch[1], row * patch[0]
                axes.add_patch(Rectangle(corner, patch[1], patch[0], fill=False, edgecolor="lime", linewidth=1.5))
            if b == 0:
                axes.set_title("image" if j == 0 else f"patch {queries[j - 1]}", fontsize=9)
    if heat is not None:
        figure.colorbar(heat, ax=grid, shrink=0.8, label="cosine of predicted to actual embedding")
    figure.savefig(path, dpi=110)
