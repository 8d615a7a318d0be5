"""Look inside a NEPA backbone: what it expects next, what surprises it, what attends to what, and its features.

nepa visualize runs/x/backbone photo.jpg holiday/ --out look
nepa visualize runs/x/backbone --data digits --out similarity.png

A folder gets index.html, in which a click on a patch shows its maps, the pictures, surprise.csv with all images, the
most surprising first, and attention.csv. A name that ends in .png or another picture's gets the similarity maps alone.
"""

import argparse
import csv
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torch import Tensor

from nepa_plugin.analysis.attention import (
    AttentionStatistics,
    check_heads,
    check_layers,
    mean_statistics,
    uniform_statistics,
)
from nepa_plugin.analysis.components import similarity_by_region
from nepa_plugin.analysis.figures import (
    picture,
    plot_attention,
    plot_components,
    plot_similarity,
    plot_statistics,
    plot_surprise,
)
from nepa_plugin.analysis.look import look
from nepa_plugin.analysis.page import write_page
from nepa_plugin.analysis.regions import patch_labels
from nepa_plugin.analysis.similarity import similarity_maps
from nepa_plugin.analysis.surprise import surprise
from nepa_plugin.commands.boundary import errors_in_one_line
from nepa_plugin.commands.naming import command_parser
from nepa_plugin.commands.predictors import load_predictor
from nepa_plugin.data import evaluation_loaders
from nepa_plugin.data.evaluation import ImageFormat, spread
from nepa_plugin.data.files import MAX_PIXELS, check_files, pixel_limit
from nepa_plugin.evaluation.prediction import image_files
from nepa_plugin.order import patch_order
from nepa_plugin.predictor import NepaViT
from nepa_plugin.runtime.files import whole_file
from nepa_plugin.runtime.places import check_file, check_folder
from nepa_plugin.runtime.ranges import PositiveInt, check_hints

FORMATS = sorted(FigureCanvasAgg.get_supported_filetypes())
#: Images of a batch when all of a folder are scored.
BATCH = 32


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: Command line arguments; ``sys.argv`` by default.

    Raises:
        SystemExit: With status 2 and one line on stderr if the input is bad.
    """
    parser = command_parser("visualize", __doc__, args)
    parser.add_argument("backbone", help="NEPA backbone: timm folder, published folder, hub id, or .ckpt")
    parser.add_argument("sources", nargs="*", metavar="IMAGE", help="image files, and folders of them")
    parser.add_argument("--data", help="in place of images: 'digits', or a folder with train/ and val/, which is read")
    parser.add_argument("--images", type=int, default=5, help="images to show; of --data spread over the classes, of a "
                        "folder the most surprising")  # fmt: skip
    parser.add_argument("--queries", type=int, nargs="+", help="patch indices in raster order")
    parser.add_argument("--layers", type=int, nargs="+", help="layers whose attention is shown; by default the first, "
                        "the middle and the last")  # fmt: skip
    parser.add_argument("--heads", type=int, nargs="+", help="heads that attention.png shows, in place of their mean; "
                        "index.html has all of them")  # fmt: skip
    parser.add_argument("--labels", type=Path, help="folder of label maps, named as the images are, .png")
    parser.add_argument("--out", type=Path, default=Path("similarity.png"), help="folder, or a picture's name")
    given = parser.parse_args(args)
    with errors_in_one_line():
        check_hints({"--images": PositiveInt}, {"--images": given.images})
        if bool(given.sources) == bool(given.data):
            raise ValueError("Give either images or --data.")
        alone = bool(given.out.suffix)
        (check_file if alone else check_folder)(given.out)
        if alone and given.out.suffix[1:].lower() not in FORMATS:
            raise ValueError(f"--out {given.out}: its name must end with one of .{', .'.join(FORMATS)}.")
        if given.labels is not None and (alone or not given.labels.is_dir()):
            raise ValueError(f"--labels {given.labels}: give a folder, and a folder as --out.")
        model = load_predictor(given.backbone)
        rows, columns = model.patch_embed.grid_size
        # a quarter, the middle and three quarters of the way down, near the centre of the row
        queries = given.queries or [int(f * rows) * columns + columns // 2 for f in (0.25, 0.5, 0.75)]
        if odd := [q for q in queries if not 0 <= q < rows * columns]:
            raise ValueError(f"Query patches {odd} are not in 0..{rows * columns - 1}.")
        depth = len(model.blocks)
        layers = given.layers or sorted({1, (depth + 1) // 2, depth})
        check_layers(model, layers)
        check_heads(model, given.heads or [])
        names, images, ranked = _images(model, given)
        if alone:
            maps = similarity_maps(model, images, queries)
            given.out.parent.mkdir(parents=True, exist_ok=True)
            cfg: Any = model.pretrained_cfg
            plot_similarity(images, maps, queries, given.out, cfg["mean"], cfg["std"])
            print(f"Wrote {given.out}")
            return
        _write(model, given, names, images, ranked, queries, layers)


def _images(model: NepaViT, given: argparse.Namespace) -> tuple[list[str], Tensor, list[tuple[str, float, float]]]:
    """Return the names and tensors (B, 3, H, W) of the images to show, and (name, surprise, of copying) of all."""
    if given.data:
        dataset: Any = evaluation_loaders(given.data, model, 1)[1].dataset
        parts = [dataset[i] for i in spread(len(dataset), given.images)]
        names, images = [str(part[2]) for part in parts], torch.stack([part[0] for part in parts])
        ranked = list(_scores(model, names, images))
    else:
        files = image_files(given.sources)
        if bad := check_files("", [str(file) for file in files]).bad:
            name, why = next(iter(sorted(bad.items())))
            raise ValueError(f"{len(bad)} file(s) cannot be read as images: {name} ({why}). Leave them out.")
        read = ImageFormat.of(model).evaluation()
        ranked = []
        tensors: dict[str, Tensor] = {}
        for start in range(0, len(files), BATCH):
            batch = [str(file) for file in files[start : start + BATCH]]
            loaded = torch.stack([_read(name, read) for name in batch])
            ranked += _scores(model, batch, loaded)
            tensors |= dict(zip(batch, loaded, strict=True))
            kept = {name for name, *_ in sorted(ranked, key=lambda row: -row[1])[: given.images]}
            tensors = {name: tensor for name, tensor in tensors.items() if name in kept}
        names = [name for name, *_ in sorted(ranked, key=lambda row: -row[1])[: given.images]]
        images = torch.stack([tensors[name] for name in names])
    return names, images, sorted(ranked, key=lambda row: -row[1])


def _read(name: str, transform: Any) -> Tensor:
    with pixel_limit(MAX_PIXELS), Image.open(name) as image:
        tensor: Tensor = transform(image.convert("RGB"))
        return tensor


def _scores(model: NepaViT, names: Sequence[str], images: Tensor) -> Iterator[tuple[str, float, float]]:
    if not model.predicts:
        yield from ((name, 0.0, 0.0) for name in names)
        return
    found = surprise(model, images)
    copied = found.copying.flatten(1).nanmean(dim=1)
    yield from zip(names, found.score.tolist(), copied.tolist(), strict=True)


def _write(
    model: NepaViT,
    given: argparse.Namespace,
    names: list[str],
    images: Tensor,
    ranked: list[tuple[str, float, float]],
    queries: Sequence[int],
    layers: Sequence[int],
) -> None:
    """Write the folder, and say what is in it."""
    regions = _regions(model, given.labels, names, images) if given.labels is not None else None
    looks = look(model, images, names, layers)
    statistics = mean_statistics(model, images)
    grid, prefix = looks[0].grid, model.num_prefix_tokens
    uniform = uniform_statistics(grid, prefix, patch_order(model.order, *grid) if model.is_causal else None)
    out = given.out
    out.mkdir(parents=True, exist_ok=True)
    cfg: Any = model.pretrained_cfg
    figures = {
        "attention": plot_attention(looks, layers, queries[len(queries) // 2], given.heads or []),
        "components": plot_components(looks),
        "statistics": plot_statistics(statistics, uniform),
    }
    if model.predicts:
        maps = similarity_maps(model, images, queries)
        plot_similarity(images, maps, queries, out / "similarity.png", cfg["mean"], cfg["std"])
        figures["surprise"] = plot_surprise(looks, {name: score for name, score, _ in ranked})
        _table(out / "surprise.csv", ("image", "surprise", "surprise_of_copying"), ranked)
    else:
        print("The outputs are no predictions of embeddings, so there is neither similarity nor surprise.")
    for name, figure in figures.items():
        with whole_file(out / f"{name}.png") as part:
            part.write_bytes(picture(figure))
    kinds = [each.name for each in fields(AttentionStatistics)]
    heads = [
        (layer, head + 1, *(float(getattr(each, kind)[head]) for kind in kinds))
        for layer, each in statistics.items()
        for head in range(len(each.distance))
    ]
    _table(out / "attention.csv", ("layer", "head", *kinds), heads)
    if regions is not None:
        _table(out / "regions.csv", ("image", "inside", "outside"), regions)
        for name, inside, outside in regions:
            print(f"{name}: cosine of patches of one region {inside:.3f}, of two {outside:.3f}")
    order = "" if model.order == "raster" else f", patches read in {model.order} order"
    about = (
        f"{given.backbone}: {len(model.blocks)} layers, {model.attention} attention{order}. Attention rows are those "
        "of the patch that attends; what goes to the class token is left out of the maps. Each map has its own scale."
    )
    write_page(looks, out / "index.html", "A look inside", about)
    for name, score, copied in ranked[:3] if model.predicts else []:
        print(f"{name}: surprise {score:.3f}, of copying the patch before {copied:.3f}")
    if model.predicts and len(ranked) > 1:
        means = [mean(column) for column in zip(*(row[1:] for row in ranked), strict=True)]
        print(f"All {len(ranked)} images: surprise {means[0]:.3f}, of copying {means[1]:.3f} on average")
    print(f"Wrote {out / 'index.html'} and the pictures and tables beside it.")


def _regions(model: NepaViT, folder: Path, names: Sequence[str], images: Tensor) -> list[tuple[str, float, float]]:
    """Return (name, similarity inside, outside) of every image whose label map there is."""
    grid = model.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
    with torch.inference_mode():
        features: Any = model.forward_intermediates(images, 1, norm=True, intermediates_only=True)
    found = []
    for name, maps in zip(names, features[0], strict=True):
        path = folder / f"{Path(name).stem}.png"
        if not path.is_file():
            raise ValueError(f"--labels: there is no {path} for {name}.")
        labels = patch_labels(path, ImageFormat.of(model), grid)
        found.append((name, *similarity_by_region(maps, labels)))
    return found


def _table(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with whole_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
