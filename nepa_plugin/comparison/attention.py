"""How the rows of a comparison attend: distance, entropy and locality by layer, on some validation images."""

from typing import Any

from nepa_plugin.analysis.attention import mean_statistics
from nepa_plugin.checkpoints import load_backbone
from nepa_plugin.comparison.plan import Run
from nepa_plugin.data import evaluation_loaders
from nepa_plugin.data.evaluation import spread

#: Validation images that are looked at.
IMAGES = 64


def look_at_attention(run: Run, data: str, crop_pct: float | None = None) -> dict[str, list[float]]:
    """Return the statistics of a backbone's attention, in the mode in which it was pretrained.

    Args:
        run: The row.
        data: ``"digits"``, or a folder that holds ``train`` and ``val``.
        crop_pct: As in the evaluation.

    Returns:
        ``distance``, ``entropy`` and ``outside``, a number per layer each, averaged over heads and images.
    """
    model: Any = load_backbone(run.folder / "backbone")
    dataset: Any = evaluation_loaders(data, model, 1, crop_pct)[1].dataset
    layers = mean_statistics(model, (dataset[i][0] for i in spread(len(dataset), IMAGES))).values()
    return {
        kind: [float(getattr(layer, kind).mean()) for layer in layers] for kind in ("distance", "entropy", "outside")
    }
