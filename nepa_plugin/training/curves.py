"""Curves of a pretraining run."""

import csv
from pathlib import Path

PANELS = (
    ("loss", ("train_loss", "copy_baseline")),
    ("skill: 0 copies the patch before", ("skill",)),
    ("accuracy, top-1", ("val_top1",)),
    ("online probe, top-1", ("train_online_cls_top1", "val_online_cls_top1")),
    ("embeddings: mean cosine of random pairs", ("embedding_cosine",)),
    ("embeddings: effective rank", ("embedding_effective_rank",)),
)


def read_metrics(path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Return the curves of a ``metrics.csv``: name -> [(step, value), ...] by step, the latest value of each step.

    Args:
        path: The file.

    Returns:
        The curves; a step that was trained twice (after a restart) appears once.
    """
    curves: dict[str, dict[int, float]] = {}
    with Path(path).open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    curves.setdefault(name, {})[int(row["step"])] = float(value)
    return {name: sorted(points.items()) for name, points in curves.items()}


def plot_training(metrics: str | Path, path: str | Path) -> None:
    """Draw loss, online probe and collapse diagnostics of a run.

    Args:
        metrics: The run's ``metrics.csv``.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = read_metrics(metrics)
    panels = [(title, [n for n in names if n in curves]) for title, names in PANELS]
    panels = [(title, names) for title, names in panels if names]
    width, height = 4.6 * max(1, len(panels)), 3.4
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    # margins in inches: half of the time of drawing was in finding them
    margins = {"left": 0.7 / width, "right": 1 - 0.2 / width, "bottom": 0.5 / height, "top": 1 - 0.35 / height}
    for i, (title, names) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for name in names:
            axes.plot(*zip(*curves[name], strict=True), label=name, marker="." if len(curves[name]) < 30 else None)
        axes.set(title=title, xlabel="optimizer step")
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend()
    figure.subplots_adjust(wspace=0.2, **margins)
    figure.savefig(path, dpi=120)
