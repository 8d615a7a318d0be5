"""The classes of images that have no label, by a fine-tuned network."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from nepa_plugin.checkpoints import Weights, class_names, load_backbone
from nepa_plugin.data.errors import DataError
from nepa_plugin.data.evaluation import ImageFormat
from nepa_plugin.data.files import IMAGE_ERRORS, MAX_PIXELS, check_files, is_image_name, pixel_limit
from nepa_plugin.data.samples import loader_workers
from nepa_plugin.evaluation.features import autocast
from nepa_plugin.runtime.files import whole_file


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of an image.

    Attributes:
        path: The image.
        classes: Names of the most probable classes, the first the best.
        probabilities: Theirs, of softmax.
    """

    path: Path
    classes: list[str]
    probabilities: list[float]


def load_classifier(source: str | Path, weights: Weights = "average") -> nn.Module:
    """Load a network with a head.

    Args:
        source: As for :func:`nepa_plugin.load_backbone`.
        weights: As for :func:`nepa_plugin.load_backbone`.

    Returns:
        The classifier in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        CheckpointError: If it does not fit.
        ValueError: If it has no head.
    """
    model = load_backbone(source, weights)
    if not getattr(model, "num_classes", 0):
        raise ValueError(
            f"{source} is a backbone, which has no classes. Fine-tune it first: nepa finetune {source} --data FOLDER "
            "--run_dir DIR writes DIR/finetuned."
        )
    return model


def image_files(sources: Iterable[str | Path]) -> list[Path]:
    """Return image files: those that are named, and those below folders in the order of their names, each once.

    Raises:
        DataError: If a name is no file and no folder, or a folder holds no image.
    """
    found: dict[Path, None] = {}
    for source in map(Path, sources):
        if source.is_dir():
            below = sorted(path for path in source.rglob("*") if is_image_name(path.name))
            if not below:
                raise DataError(f"{source} holds no image file.")
            found |= dict.fromkeys(below)
        elif source.exists():
            found[source] = None
        else:
            raise DataError(f"No image at {source}.")
    return list(found)


class _Files(Dataset[tuple[int, Any]]):
    def __init__(self, files: Sequence[Path], transform: Any, max_pixels: int) -> None:
        self.files, self.transform, self.max_pixels = files, transform, max_pixels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        """Return the image, or why there is none."""
        try:
            with pixel_limit(self.max_pixels), Image.open(self.files[index]) as image:
                return index, self.transform(image.convert("RGB"))
        except IMAGE_ERRORS as error:
            return index, " ".join(str(error).split()) or type(error).__name__


def predict(
    model: Any,
    files: Sequence[Path],
    top: int = 5,
    batch_size: int = 64,
    form: ImageFormat | None = None,
    device: str | torch.device = "cpu",
    num_workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Prediction | tuple[Path, str]]:
    """Classify images, in batches.

    Args:
        model: A classifier of timm; it is put into evaluation mode on the device.
        files: The images, read as in training: as they are stored, whatever their EXIF orientation.
        top: Number of classes that are said of each image, at most all.
        batch_size: Images at a time.
        form: How they are resized and normalised; the model's own by default.
        device: Where to run; bf16 autocast on CUDA.
        num_workers: Loader processes.
        max_pixels: The most pixels that an image may have.

    Yields:
        In the order of the files a prediction, or the file and why it cannot be read.
    """
    form = form or ImageFormat.of(model)
    device = torch.device(device)
    model.to(device).eval()
    names = class_names(model) or [str(i) for i in range(model.num_classes)]
    # pipes and the like would be waited for without end
    bad = {Path(name): why for name, why in check_files("", [str(file) for file in files], max_pixels).bad.items()}
    good = [file for file in files if file not in bad]
    loader = DataLoader(
        _Files(good, form.evaluation(), max_pixels),
        batch_size=batch_size,
        num_workers=loader_workers(num_workers, 1),
        collate_fn=list,
        pin_memory=device.type == "cuda",
    )
    told = iter(files)
    for batch in loader:
        found: dict[Path, Prediction | tuple[Path, str]] = {
            good[i]: (good[i], content) for i, content in batch if isinstance(content, str)
        }
        read = [(good[i], content) for i, content in batch if isinstance(content, Tensor)]
        if read:
            with torch.no_grad(), autocast(device):
                logits = model(torch.stack([image for _, image in read]).to(device, non_blocking=True))
            values, classes = logits.float().softmax(dim=1).topk(min(top, len(names)), dim=1)
            for (path, _), value, chosen in zip(read, values.tolist(), classes.tolist(), strict=True):
                found[path] = Prediction(path, [names[i] for i in chosen], value)
        last = good[batch[-1][0]]
        for path in told:
            yield found[path] if path in found else (path, bad[path])
            if path == last:
                break
    for path in told:
        yield path, bad[path]


def write_predictions(predictions: Sequence[Prediction], path: str | Path) -> None:
    """Write a CSV: a row per image, with its name and the classes and probabilities from the best on."""
    most = max((len(prediction.classes) for prediction in predictions), default=0)
    columns = [name for i in range(1, most + 1) for name in (f"class_{i}", f"probability_{i}")]
    with whole_file(path) as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *columns])
        for found in predictions:
            pairs = zip(found.classes, found.probabilities, strict=True)
            writer.writerow([found.path, *(cell for name, value in pairs for cell in (name, f"{value:.6g}"))])


def prediction_grid(predictions: Sequence[Prediction], path: str | Path, columns: int = 6) -> None:
    """Draw images with their best classes under them.

    Args:
        predictions: At least one.
        path: The picture; its suffix says the format.
        columns: Images in a row.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(predictions) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    for axis, found in zip(axes, predictions, strict=False):
        with Image.open(found.path) as image:
            picture = image.convert("RGB")
        picture.thumbnail((256, 256))
        axis.imshow(picture)
        lines = [
            f"{name[:24]} {100 * p:.0f} %" for name, p in zip(found.classes[:3], found.probabilities, strict=False)
        ]
        axis.set_title(found.path.name[:28], fontsize="x-small")
        axis.text(0.5, -0.03, "\n".join(lines), transform=axis.transAxes, ha="center", va="top", fontsize="x-small")
    figure.savefig(path, dpi=110)
