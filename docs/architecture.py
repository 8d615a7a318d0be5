"""Draw the rooms of the package and their imports, and write the table of them into the page.

python docs/architecture.py  # writes docs/architecture.png and the table in docs/architecture.md
"""

import ast
import json
import re
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path as Curve

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "tests"))
from imports import FLOOR, FLOORS, arrows, modules  # noqa: E402

PICTURE, PAGE = DOCS / "architecture.png", DOCS / "architecture.md"
START, END = "<!-- written by docs/architecture.py -->", "<!-- end -->"
#: Centre and width of each room's box, and what stands in it under the name.
BOXES = {
    "commands": (7.5, 15.0, "the command nepa; it imports whatever it starts"),
    "comparison": (4.8, 2.6, "methods on equal terms"),
    "speed": (10.0, 3.9, "step time, memory, FLOPs"),
    "evaluation": (1.9, 2.4, "kNN, probes, fine-tuning"),
    "training": (7.05, 2.25, "the training commands"),
    "finetuning": (4.3, 2.1, "recipe, head, module"),
    "segmentation": (1.2, 2.4, "the mmengine side"),
    "methods": (10.5, 2.9, "one file per method"),
    "analysis": (10.55, 2.0, "similarity, collapse"),
    "data": (5.9, 2.4, "images in"),
    "checkpoints": (1.5, 2.2, "weights in and out"),
    "runtime": (8.5, 2.8, "devices, sharding, EMA"),
    "models": (1.9, 2.3, "timm names and sizes"),
    "predictor": (5.9, 11.8, "the causal ViT on timm's Eva"),
    "loss": (13.3, 2.4, "next embedding"),
}
#: Where an arrow leaves and enters, and the heights between which it is no straight line down, where the rule below
#: would lead it behind a box.
ROUTES: dict[tuple[str, str], tuple[float, ...]] = {
    ("comparison", "checkpoints"): (3.7, 2.35, 7.55, 3.6),
    ("comparison", "evaluation"): (4.0, 1.9),
    ("comparison", "data"): (5.5, 5.62),
    ("comparison", "runtime"): (5.75, 8.27, 6.6, 1.45),
    ("comparison", "training"): (5.95, 7.0),
    ("speed", "data"): (8.2, 6.85, 5.75, 3.41),
    ("speed", "models"): (8.5, 2.85, 2.65, 1.45),
    ("speed", "runtime"): (8.85, 8.85),
    ("speed", "methods"): (10.55, 10.55),
    ("evaluation", "checkpoints"): (1.9, 1.65),
    ("evaluation", "predictor"): (2.2, 3.3, 4.4, 0.45),
    ("evaluation", "runtime"): (2.5, 7.75, 3.15, 1.6),
    ("evaluation", "data"): (2.75, 5.0, 5.6, 3.5),
    ("evaluation", "finetuning"): (2.95, 3.8),
    ("evaluation", "methods"): (3.05, 9.35, 6.72, 5.45),
    ("training", "finetuning"): (6.2, 4.8),
    ("training", "checkpoints"): (6.4, 2.05),
    ("training", "data"): (6.65, 6.1),
    ("training", "runtime"): (7.2, 8.54),
    ("training", "methods"): (7.7, 9.9),
    ("finetuning", "checkpoints"): (3.5, 1.85),
    ("finetuning", "models"): (3.75, 2.5, 3.6, 1.45),
    ("finetuning", "predictor"): (4.0, 4.0),
    ("finetuning", "data"): (4.4, 5.3),
    ("finetuning", "runtime"): (4.75, 8.0),
    ("finetuning", "methods"): (5.1, 9.6),
    ("segmentation", "predictor"): (0.2, 0.2),
    ("segmentation", "checkpoints"): (1.0, 1.2),
    ("segmentation", "runtime"): (1.7, 7.52, 3.6, 1.5),
    ("segmentation", "data"): (2.1, 4.8),
    ("methods", "data"): (9.3, 6.45, 4.73, 3.41),
    ("methods", "checkpoints"): (9.15, 2.5, 4.73, 3.1),
    ("methods", "runtime"): (9.42, 9.3),
    ("methods", "analysis"): (10.55, 10.55),
    ("methods", "predictor"): (11.65, 11.65),
    ("methods", "loss"): (11.8, 12.4),
    ("data", "runtime"): (6.3, 8.03),
    ("data", "predictor"): (5.6, 5.6),
    ("checkpoints", "predictor"): (0.55, 0.55),
    ("checkpoints", "models"): (1.6, 1.6),
    ("checkpoints", "runtime"): (2.35, 7.3, 1.73, 1.45),
    ("models", "predictor"): (1.9, 1.9),
}
#: The roof imports nearly all rooms: its arrows are in the table only.
NOT_DRAWN = "commands"
HALF = 0.27  # of a box's height, in floors
COLOURS = {
    "comparison": "#8c564b",
    "speed": "#7f7f7f",
    "evaluation": "#2ca02c",
    "training": "#d62728",
    "finetuning": "#9467bd",
    "methods": "#1f77b4",
    "segmentation": "#e07b00",
}


def ports() -> dict[tuple[str, str], tuple[float, ...]]:
    """Return where each arrow leaves and enters: along the boxes' edges, in the order of the arrows' other ends."""
    drawn = [pair for pair in arrows() if pair[0] != NOT_DRAWN]
    found: dict[tuple[str, str], list[float]] = {pair: [0.0, 0.0] for pair in drawn}
    for name, (centre, width, _) in BOXES.items():
        for end in (0, 1):
            pairs = [pair for pair in drawn if pair[end] == name]
            if width > 5:  # straight down onto a wide box
                for pair in pairs:
                    found[pair][end] = found[pair][1 - end]
                continue
            pairs.sort(key=lambda pair: BOXES[pair[1 - end]][0] if BOXES[pair[1 - end]][1] < 5 else centre)
            step = min(0.4, (width - 0.5) / max(1, len(pairs) - 1))
            for i, pair in enumerate(pairs):
                found[pair][end] = centre + (i - (len(pairs) - 1) / 2) * step
    return {pair: ROUTES.get(pair, (leaves, enters)) for pair, (leaves, enters) in found.items()}


def draw() -> Figure:
    """Return the picture: rooms on their floors, an arrow from each to the rooms that it imports."""
    figure = Figure(figsize=(11.5, 8.5))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set(xlim=(-0.25, 15.25), ylim=(-1.0, len(FLOORS) - 0.45))
    axes.axis("off")
    for floor in range(0, len(FLOORS), 2):
        axes.add_patch(Rectangle((-0.25, floor - 0.5), 15.5, 1, color="#f3f3f3", zorder=0))
    for name, (centre, width, text) in BOXES.items():
        low = FLOOR[name] - HALF
        style = "round,pad=0,rounding_size=0.08"
        edge = COLOURS.get(name, "#333333")
        box = FancyBboxPatch((centre - width / 2, low), width, 2 * HALF, style, fc="white", ec=edge, lw=1.6, zorder=3)
        axes.add_patch(box)
        axes.text(centre, FLOOR[name] + 0.09, name, ha="center", va="center", weight="bold", size=12, zorder=4)
        axes.text(centre, FLOOR[name] - 0.13, text, ha="center", va="center", size=9, color="#444444", zorder=4)
    for (above, below), (leaves, enters, *bent) in ports().items():
        top, bottom = FLOOR[above] - HALF, FLOOR[below] + HALF + 0.03
        start, stop = bent or (top, bottom + 0.14)  # the head stands on a straight end
        middle = (start + stop) / 2
        points = [(leaves, top), (leaves, start), (leaves, middle), (enters, middle), (enters, stop), (enters, bottom)]
        curve = Curve(points, [Curve.MOVETO, Curve.LINETO, *[Curve.CURVE4] * 3, Curve.LINETO])
        width = line_width(arrows()[above, below])
        head = f"-|>,head_length={4 + width},head_width={2 + width / 2}"
        colour = COLOURS.get(above, "#333333")
        axes.add_patch(FancyArrowPatch(path=curve, arrowstyle=head, lw=width, color=colour, zorder=2))
    axes.text(0, -0.75, "Imports of modules of one room by modules of the other:", va="center", size=10)
    for i, count in enumerate((1, 4, 9, 16)):
        axes.plot([6.2 + 1.8 * i, 7.0 + 1.8 * i], [-0.75, -0.75], color="#333333", lw=line_width(count))
        axes.text(7.15 + 1.8 * i, -0.75, str(count), va="center", size=10)
    return figure


def line_width(count: int) -> float:
    """Return the width in points of an arrow that stands for so many imports."""
    return 1.2 * count**0.5


def first_sentence(name: str) -> str:
    """Return what a room's docstring says first."""
    path = modules()[f"nepa_plugin.{name}"]
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split()).replace("``", "`")
    return re.split(r"(?<=\.) |\. See", text)[0].rstrip(".")


def table() -> str:
    """Return the rooms as a Markdown table, from the roof down."""
    lines = ["| room | what it holds | imports |", "| --- | --- | --- |"]
    for floor in reversed(FLOORS):
        for name in (name for name in BOXES if name in floor):
            below = sorted((pair[1] for pair in arrows() if pair[0] == name), key=lambda other: (-FLOOR[other], other))
            lines.append(f"| **{name}** | {first_sentence(name)} | {', '.join(below)} |")
    return "\n".join(lines)


def main() -> None:
    """Write both files."""
    draw().savefig(PICTURE, dpi=150, metadata={"Description": json.dumps(sorted(arrows()))})
    if PAGE.is_file():
        before, _, rest = PAGE.read_text().partition(START)
        PAGE.write_text(f"{before}{START}\n\n{table()}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
