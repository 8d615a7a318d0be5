"""Everything there is to see of some images, in maps over their patches."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nepa_plugin.analysis.attention import attention_probabilities, check_layers, rollout
from nepa_plugin.analysis.components import principal_colours
from nepa_plugin.analysis.similarity import similarity_maps
from nepa_plugin.analysis.surprise import surprise
from nepa_plugin.predictor import NepaViT


@dataclass(frozen=True)
class PatchMap:
    """Numbers over the patches of an image.

    Attributes:
        group: What it is of.
        name: Which of the group.
        values: (N,), or (N, N) with a row per patch that is asked about, in raster order.
    """

    group: str
    name: str
    values: Tensor

    @property
    def by_patch(self) -> bool:
        """Whether every patch has a map of its own."""
        return self.values.ndim == 2


@dataclass
class Look:
    """What there is to see of an image.

    Attributes:
        name: Of the image.
        pixels: What the model sees, (3, H, W) from 0 to 1.
        grid: (rows, columns) of its patches.
        maps: Over the patches.
        colours: Principal components of the features as colours, (3, rows, columns) from 0 to 1.
    """

    name: str
    pixels: Tensor
    grid: tuple[int, int]
    maps: list[PatchMap] = field(default_factory=list)
    colours: Tensor | None = None


def look(model: NepaViT, images: Tensor, names: Sequence[str], layers: Sequence[int]) -> list[Look]:
    """Look at images one by one; without similarity and surprise where a model's outputs are no predictions.

    Args:
        model: The predictor.
        images: Normalised images (B, C, H, W).
        names: Of the images.
        layers: Whose attention is shown, from 1. For the rollout of one, those below it are computed, too.

    Raises:
        ValueError: If there is no such layer.
    """
    check_layers(model, layers)
    cfg: Any = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key])[:, None, None] for key in ("mean", "std"))
    grid = model.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
    prefix, patches = model.num_prefix_tokens, grid[0] * grid[1]
    with torch.inference_mode():
        features: Any = model.forward_intermediates(images, 1, norm=True, intermediates_only=True)
        colours = principal_colours(features[0])
    found = []
    for i, name in enumerate(names):
        image = images[i : i + 1]
        one = Look(name, (images[i].cpu() * std + mean).clamp(0, 1), grid, colours=colours[i].cpu())
        if model.predicts:
            similar = similarity_maps(model, image, range(patches))[0].flatten(1)
            surprised = surprise(model, image)
            predicting, copying = (part[0].flatten() for part in (surprised.predicting, surprised.copying))
            one.maps += [
                PatchMap("similarity", "of the predicted embedding to all patches", similar),
                PatchMap("surprise", "1 - cosine of the predicted to the own embedding", predicting),
                PatchMap("surprise", "the same for a copy of the patch read before", copying),
            ]
        probabilities = attention_probabilities(model, image, range(1, max(layers, default=0) + 1))
        for layer in layers:
            heads = probabilities[layer][0, :, prefix:, prefix:]
            flow = rollout([probabilities[below] for below in range(1, layer + 1)])[0, prefix:, prefix:]
            of_all = {"mean of heads": heads.mean(dim=0), "largest of heads": heads.amax(dim=0), "rollout": flow}
            by_head = {f"head {h + 1}": head for h, head in enumerate(heads)}
            one.maps += [PatchMap(f"attention, layer {layer}", n, v) for n, v in (of_all | by_head).items()]
        found.append(one)
    return found
