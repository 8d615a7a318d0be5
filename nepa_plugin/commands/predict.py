"""Classify images with a fine-tuned network: the most probable classes of each, as a table, a CSV and a picture.

nepa predict runs/mine/finetuned photo.jpg holiday/ --out predictions
ls *.jpg | nepa predict runs/mine/finetuned -
"""

import sys
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nepa_plugin.commands.boundary import errors_in_one_line
from nepa_plugin.commands.naming import command_parser
from nepa_plugin.data.evaluation import ImageFormat
from nepa_plugin.data.files import MAX_PIXELS
from nepa_plugin.evaluation.prediction import (
    Prediction,
    image_files,
    load_classifier,
    predict,
    prediction_grid,
    write_predictions,
)
from nepa_plugin.runtime.places import check_folder
from nepa_plugin.runtime.ranges import NonNegativeInt, PositiveFraction, PositiveInt, check_hints

#: Images of the table, and of the picture.
SHOWN, DRAWN = 20, 24


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: Command line arguments; ``sys.argv`` by default.

    Raises:
        SystemExit: With status 2 and one line on stderr if the input is bad, or no image can be read.
    """
    parser = command_parser("predict", __doc__, args)
    parser.add_argument("classifier", help="fine-tuned network: timm folder, published folder, or hub id")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders, or - for names on stdin")
    parser.add_argument("--out", type=Path, help="folder for predictions.csv and predictions.png")
    parser.add_argument("--top", type=int, default=5, help="classes per image")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, help="loader processes")
    parser.add_argument("--weights", choices=["average", "raw"], default="average", help="of a published run folder")
    parser.add_argument("--crop_pct", type=float, help="centre crop over resized side; by default the model's own")
    parser.add_argument("--crop_mode", choices=["center", "squash"], default="center")
    parser.add_argument("--max_image_pixels", type=int, default=MAX_PIXELS)
    parser.add_argument("--accelerator", choices=["auto", "cuda", "cpu"], default="auto")
    given = parser.parse_args(args)
    with errors_in_one_line():
        hints = {
            **dict.fromkeys(("top", "batch_size", "max_image_pixels"), PositiveInt),
            "num_workers": NonNegativeInt | None,
            "crop_pct": PositiveFraction | None,
        }
        check_hints(
            {f"--{name}": hint for name, hint in hints.items()},
            {f"--{name}": getattr(given, name) for name in hints},
        )
        if given.accelerator == "cuda" and not torch.cuda.is_available():
            raise ValueError("CUDA was asked for, but no CUDA device is available. Use --accelerator cpu.")
        if given.out is not None:
            check_folder(given.out)
        names = [line.rstrip("\n") for line in sys.stdin if line.strip()] if "-" in given.images else []
        files = image_files([*(name for name in given.images if name != "-"), *names])
        if not files:
            raise ValueError("No image was named on stdin.")
        model = load_classifier(given.classifier, given.weights)
        device = "cuda" if given.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
        form = ImageFormat.of(model, given.crop_pct, given.crop_mode)
        options = given.top, given.batch_size, form, device, given.num_workers, given.max_image_pixels
        predictions, unread = [], []
        for found in predict(model, files, *options):
            predictions.append(found) if isinstance(found, Prediction) else unread.append(found)
        if not predictions:
            reasons = ", ".join(f"{path} ({why})" for path, why in unread[:5]) + (" ..." if len(unread) > 5 else "")
            raise ValueError(f"None of {len(unread)} file(s) can be read as an image: {reasons}.")
        for path, why in unread:
            sys.stderr.write(f"not read: {path} ({why})\n")
        table = Table("image", *(f"{i + 1}" for i in range(min(given.top, 5))), title=None)
        for found in islice(predictions, SHOWN):
            pairs = list(zip(found.classes, found.probabilities, strict=True))[:5]
            table.add_row(escape(found.path.name), *(f"{escape(name)} {100 * value:.1f} %" for name, value in pairs))
        Console().print(table)
        if len(predictions) > SHOWN:
            print(f"and {len(predictions) - SHOWN} more" + ("" if given.out else ": --out FOLDER writes all of them"))
        if given.out is not None:
            given.out.mkdir(parents=True, exist_ok=True)
            write_predictions(predictions, given.out / "predictions.csv")
            prediction_grid(predictions[:DRAWN], given.out / "predictions.png")
            print(f"Wrote {given.out / 'predictions.csv'} and {given.out / 'predictions.png'}")
