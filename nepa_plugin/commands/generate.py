"""Let a NEPA backbone go on with images of which it sees the first patches, and draw what it imagines.

nepa generate runs/x/backbone --data digits --out generated

Writes generation.png (image, decoded embeddings, decoded one-step predictions, and rollouts from some given parts) and
similarity.csv and .png (cosine to the image's own embeddings by the number of patches rolled forward).
"""

import csv
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from nepa_plugin.analysis.decoder import PixelDecoder
from nepa_plugin.analysis.figures import outline, picture
from nepa_plugin.analysis.generation import Rollout, roll_forward
from nepa_plugin.commands.boundary import errors_in_one_line
from nepa_plugin.commands.naming import command_parser
from nepa_plugin.commands.predictors import load_predictor
from nepa_plugin.data import evaluation_loaders
from nepa_plugin.data.evaluation import spread
from nepa_plugin.order import patch_order
from nepa_plugin.predictor import NepaViT
from nepa_plugin.runtime.files import whole_file
from nepa_plugin.runtime.places import check_folder
from nepa_plugin.runtime.ranges import FractionBelowOne, NonNegativeInt, PositiveFraction, PositiveInt, check_hints

#: Images that the decoder is fitted to, and images over which similarity is averaged.
FITTED, SCORED = 1000, 200


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: Command line arguments; ``sys.argv`` by default.

    Raises:
        SystemExit: With status 2 and one line on stderr if the input is bad.
    """
    parser = command_parser("generate", __doc__, args)
    parser.add_argument("backbone", help="NEPA backbone: timm folder, published folder, hub id, or .ckpt")
    parser.add_argument("--data", required=True, help="'digits', or a folder with train/ and val/")
    parser.add_argument("--known", type=float, nargs="+", default=[0.75, 0.5, 0.25], help="parts of the patches given")
    parser.add_argument("--images", type=int, default=6, help="validation images to draw, spread over the classes")
    parser.add_argument("--seed", type=int, default=0, help="of the decoder's fit")
    parser.add_argument("--out", type=Path, default=Path("generated"), help="folder")
    given = parser.parse_args(args)
    with errors_in_one_line():
        check_hints(
            {"--images": PositiveInt, "--seed": NonNegativeInt, "--known": list[PositiveFraction]},
            {"--images": given.images, "--seed": given.seed, "--known": given.known},
        )
        check_hints({"--known": list[FractionBelowOne]}, {"--known": given.known})
        check_folder(given.out)
        model = load_predictor(given.backbone)
        if not model.is_causal:
            raise ValueError(f"{given.backbone} has bidirectional attention: only a causal one can be rolled forward.")
        model.check_predicts()
        rows, columns = model.patch_embed.grid_size
        parts = {part: min(rows * columns - 1, max(1, round(part * rows * columns))) for part in given.known}
        train, val = (loader.dataset for loader in evaluation_loaders(given.data, model, 1))
        decoder = PixelDecoder(model, _images(train, FITTED), given.seed)
        shown, scored = _images(val, given.images), _images(val, SCORED)
        given.out.mkdir(parents=True, exist_ok=True)
        rollouts = {part: roll_forward(model, shown, known) for part, known in parts.items()}
        with whole_file(given.out / "generation.png") as file:
            file.write_bytes(picture(_draw(model, shown, rollouts, decoder)))
        similarity = {part: roll_forward(model, scored, known).similarity() for part, known in parts.items()}
        _write(given.out, similarity)
        for part, found in similarity.items():
            said = ", ".join(f"{name} {float(values.mean()):.3f}" for name, values in found.items())
            print(f"{part:.0%} of the patches given; cosine to the image's own, mean of those after: {said}")
        print(f"Wrote {given.out / 'generation.png'} and similarity.csv and .png beside it.")


def _images(dataset: Any, number: int) -> Tensor:
    """Return so many images of a dataset (B, 3, H, W), or all, spread over it."""
    return torch.stack([dataset[i][0] for i in spread(len(dataset), number)])


def _draw(model: NepaViT, images: Tensor, rollouts: dict[float, Rollout], decoder: PixelDecoder) -> Figure:
    """Draw a row per image: itself, what is decoded of its embeddings, of one-step predictions, and of rollouts."""
    cfg: Any = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key])[:, None, None] for key in ("mean", "std"))
    grid: tuple[int, int] = tuple(model.patch_embed.grid_size)  # type: ignore[assignment]
    order = patch_order(model.order, *grid)
    places = torch.tensor(order).argsort()
    any_of_them = next(iter(rollouts.values()))
    columns = {"image": images, "its embeddings": decoder(any_of_them.own[:, places])}
    columns["one step"] = decoder(any_of_them.one_step[:, places])
    columns |= {f"{part:.0%} given": decoder(each.rolled[:, places]) for part, each in rollouts.items()}
    known = dict.fromkeys(columns, 0) | {f"{part:.0%} given": each.known for part, each in rollouts.items()}
    figure = Figure(figsize=(1.7 * len(columns), 1.7 * len(images) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(images), len(columns), squeeze=False)
    for b, line in enumerate(panels):
        for axes, (title, content) in zip(line, columns.items(), strict=True):
            pixels = (content[b].cpu() * std + mean).clamp(0, 1)
            height, width = pixels.shape[1:]
            axes.set_axis_off()
            axes.imshow(pixels.permute(1, 2, 0), extent=(0, width, height, 0), interpolation="nearest")
            if known[title]:  # the first patch that was not given
                outline(axes, order[known[title]], grid, (height, width), "lime", False)
            if b == 0:
                axes.set_title(title, fontsize=9)
    return figure


def _write(out: Path, similarity: dict[float, dict[str, Tensor]]) -> None:
    with whole_file(out / "similarity.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["given", "patches_after", "rolled", "one_step", "copy"])
        for given, found in similarity.items():
            for i in range(len(found["rolled"])):
                writer.writerow([given, i + 1, *(f"{float(found[name][i]):.6g}" for name in found)])
    figure = Figure(figsize=(3.6 * len(similarity), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(similarity), sharey=True, squeeze=False)[0]
    for axes, (given, found) in zip(panels, similarity.items(), strict=True):
        for (name, values), style in zip(found.items(), ("-", "--", ":"), strict=True):
            axes.plot(range(1, len(values) + 1), values, style, label=name)
        axes.set(title=f"{given:.0%} given", xlabel="patches after those given")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("cosine to the image's own embedding")
    panels[0].legend(fontsize=8)
    with whole_file(out / "similarity.png") as part:
        part.write_bytes(picture(figure))
