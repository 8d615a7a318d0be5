"""Draw what a NEPA backbone expects: similarity of predicted embeddings to all patches of some images.

nepa visualize runs/x/backbone --data digits --out similarity.png
"""

from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from nepa_plugin.analysis.similarity import plot_similarity, similarity_maps
from nepa_plugin.checkpoints import load_backbone
from nepa_plugin.commands.boundary import errors_in_one_line
from nepa_plugin.commands.naming import command_parser
from nepa_plugin.data import evaluation_loaders
from nepa_plugin.predictor import NepaViT
from nepa_plugin.runtime.places import check_file
from nepa_plugin.runtime.ranges import PositiveInt, check_hints


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: Command line arguments; ``sys.argv`` by default.

    Raises:
        SystemExit: With status 2 and one line on stderr if the input is bad.
    """
    parser = command_parser("visualize", __doc__, args)
    parser.add_argument("backbone", help="NEPA backbone: timm folder, published folder, hub id, or .ckpt")
    parser.add_argument("--data", required=True, help="'digits', or a folder with train/ and val/")
    parser.add_argument("--images", type=int, default=5, help="number of validation images, spread over the classes")
    parser.add_argument("--queries", type=int, nargs="+", help="patch indices in raster order")
    parser.add_argument("--out", type=Path, default=Path("similarity.png"))
    given = parser.parse_args(args)
    with errors_in_one_line():
        check_hints({"--images": PositiveInt}, {"--images": given.images})
        check_file(given.out)
        if given.out.suffix[1:].lower() not in (formats := sorted(FigureCanvasAgg.get_supported_filetypes())):
            raise ValueError(f"--out {given.out}: its name must end with one of .{', .'.join(formats)}.")
        model = load_backbone(given.backbone)
        if not isinstance(model, NepaViT):
            raise ValueError(f"{given.backbone} holds a {type(model).__name__}, which predicts no next embedding.")
        dataset = evaluation_loaders(given.data, model, 1)[1].dataset
        chosen = range(0, len(dataset), max(1, len(dataset) // given.images))[: given.images]
        images = torch.stack([dataset[i][0] for i in chosen])
        rows, columns = model.patch_embed.grid_size
        # a quarter, the middle and three quarters of the way down, near the centre of the row
        queries = given.queries or [int(f * rows) * columns + columns // 2 for f in (0.25, 0.5, 0.75)]
        maps = similarity_maps(model, images, queries)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        plot_similarity(images, maps, queries, given.out, cfg["mean"], cfg["std"])
        print(f"Wrote {given.out}")
