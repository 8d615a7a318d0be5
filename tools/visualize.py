"""Draw what a NEPA backbone expects: similarity of predicted embeddings to all patches of some images.

python tools/visualize.py runs/x/backbone --data digits --out similarity.png
"""

import argparse
import sys
from pathlib import Path

import torch

from nepa_plugin.analysis.similarity import plot_similarity, similarity_maps
from nepa_plugin.checkpoints import load_backbone
from nepa_plugin.data import evaluation_loaders
from nepa_plugin.predictor import NepaViT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", help="NEPA backbone: timm folder, published folder, hub id, or .ckpt")
    parser.add_argument("--data", required=True, help="'digits', or a folder with train/ and val/")
    parser.add_argument("--images", type=int, default=5, help="number of validation images, spread over the classes")
    parser.add_argument("--queries", type=int, nargs="+", help="patch indices in raster order")
    parser.add_argument("--out", type=Path, default=Path("similarity.png"))
    args = parser.parse_args()
    try:
        model = load_backbone(args.backbone)
        if not isinstance(model, NepaViT):
            sys.exit(f"error: {args.backbone} holds a {type(model).__name__}, which predicts no next embedding.")
        dataset = evaluation_loaders(args.data, model, 1)[1].dataset
        chosen = range(0, len(dataset), max(1, len(dataset) // args.images))[: args.images]
        images = torch.stack([dataset[i][0] for i in chosen])
        rows, columns = model.patch_embed.grid_size
        # a quarter, the middle and three quarters of the way down, near the centre of the row
        queries = args.queries or [int(f * rows) * columns + columns // 2 for f in (0.25, 0.5, 0.75)]
        maps = similarity_maps(model, images, queries)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plot_similarity(images, maps, queries, args.out, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    main()
