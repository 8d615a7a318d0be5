"""How the rows of a comparison attend: distance, entropy and locality by layer, on some validation images."""

from statistics import mean
from typing import Any

from nepa_plugin.analysis.attention import attention_probabilities, attention_statistics
from nepa_plugin.checkpoints import load_backbone
from nepa_plugin.comparison.plan import Run
from nepa_plugin.data import evaluation_loaders

#: Validation images that are looked at, spread over the classes.
IMAGES = 64
KINDS = ("distance", "entropy", "outside")


def look_at_attention(run: Run, data: str, crop_pct: float | None = None) -> dict[str, list[float]]:
    """Return the statistics of a backbone's attention, in the mode in which it was pretrained.

    Args:
        run: The row.
        data: ``"digits"``, or a folder that holds ``train`` and ``val``.
        crop_pct: As in the evaluation.

    Returns:
        By kind of :data:`KINDS` a number per layer, averaged over heads and images.
    """
    model: Any = load_backbone(run.folder / "backbone")
    dataset: Any = evaluation_loaders(data, model, 1, crop_pct)[1].dataset
    chosen = range(0, len(dataset), max(1, len(dataset) // IMAGES))[:IMAGES]
    prefix = int(model.num_prefix_tokens)
    found: dict[str, list[list[float]]] = {kind: [[] for _ in model.blocks] for kind in KINDS}
    for i in chosen:  # one by one: the matrices of all layers of a large model are 40 MB
        image = dataset[i][0][None]
        grid = model.patch_embed.dynamic_feat_size((image.shape[-2], image.shape[-1]))
        for layer, probabilities in attention_probabilities(model, image).items():
            statistics = attention_statistics(probabilities, grid, prefix)
            for kind in KINDS:
                found[kind][layer - 1].append(float(getattr(statistics, kind).mean()))
    return {kind: [mean(values) for values in layers] for kind, layers in found.items()}
