"""A trained segmentor on single images: predictions, pictures of them, and IoU per class."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.apis import inference_model, init_model
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.evaluation import IoUMetric
from mmseg.registry import DATASETS
from PIL import Image, ImageOps
from torch import nn

from nepa_plugin.checkpoints import read_tensors
from nepa_plugin.segmentation.boundary import in_one_line
from nepa_plugin.segmentation.datasets import VOID, read_label_map, shown_size
from nepa_plugin.segmentation.errors import ConfigError, DatasetError
from nepa_plugin.segmentation.hooks import check_segmentor

_LEGEND_ENTRIES = 24


def load_segmentor(config: str | Path, checkpoint: str | Path, device: str = "cpu") -> nn.Module:
    """Build the segmentor of a config and load a checkpoint of it, all weights or none.

    Args:
        config: mmengine config file.
        checkpoint: ``.pth`` of a run with this config.
        device: Where to put the model.

    Returns:
        The model in evaluation mode, with mmsegmentation's ``cfg`` and ``dataset_meta`` (``classes``, ``palette``,
        ``reduce_zero_label``, ``label_map``).

    Raises:
        FileNotFoundError: If config or checkpoint does not exist.
        ConfigError: If the config cannot be read or built, or is for multi-scale testing.
        CheckpointError: If the checkpoint is not one of this model; names the weights.
    """
    for what, path in (("config", config), ("checkpoint", checkpoint)):
        if not Path(path).is_file():
            raise FileNotFoundError(f"No {what} at {path}.")
    cfg = _read_config(config)
    if "module" in cfg.model:
        raise ConfigError(f"{config} is for multi-scale testing with mim test. Give the config that it is based on.")
    init_default_scope(cfg.get("default_scope", "mmseg"))
    try:
        model: Any = init_model(cfg, device=device)
    except Exception as error:
        if (line := in_one_line(error, error.__traceback__)) is None:
            raise
        raise ConfigError(f"{config}: {line}") from error
    stored = read_tensors(checkpoint)
    check_segmentor(model, stored, str(checkpoint))
    model.load_state_dict(stored["state_dict"])
    # The checkpoint's own names count: the config may have been pointed at other data since.
    dataset = DATASETS.get(cfg.test_dataloader.dataset.type)
    zero_is_void = bool(getattr(dataset, "zero_is_void", False))
    known = {**dataset.METAINFO, "reduce_zero_label": zero_is_void, "label_map": None}
    model.dataset_meta = known | (stored.get("meta", {}).get("dataset_meta") or {})
    return model  # type: ignore[no-any-return]


def _read_config(path: str | Path) -> Config:
    try:
        cfg = Config.fromfile(path)
    except RecursionError:
        raise ConfigError(f"{path}: its _base_ leads back to itself.") from None
    except Exception as error:  # a config is a program: anything can go wrong in it
        said = " ".join(str(error).split())
        raise ConfigError(f"{path} is no config that mmengine can read: {type(error).__name__}: {said}") from error
    if "model" not in cfg:
        raise ConfigError(f"{path} has no model: it is not the config of a segmentation run.")
    return cfg


def check_image(path: str | Path) -> tuple[int, int]:
    """Check that a file is an image.

    Args:
        path: The file.

    Returns:
        Height and width in pixels, as the image is shown.

    Raises:
        DatasetError: If it is none.
    """
    try:
        with Image.open(path) as image:
            image.verify()
        with Image.open(path) as image:  # after that it must be opened anew
            size = shown_size(image)
    except (OSError, SyntaxError) as error:
        raise DatasetError(f"{path} cannot be read as an image: {error}") from error
    return size[1], size[0]


def predict(model: nn.Module, image: str | Path) -> np.ndarray:
    """Segment one image with the config's test pipeline and test mode.

    Args:
        model: From :func:`load_segmentor`.
        image: Image file.

    Returns:
        Class indices (H, W) at the image's own size.

    Raises:
        DatasetError: If the file is no image.
    """
    check_image(image)
    classes: np.ndarray = inference_model(model, str(image)).pred_sem_seg.data[0].cpu().numpy()
    return classes


def read_labels(path: str | Path, model: nn.Module) -> np.ndarray:
    """Read a label map as the model's class indices, as mmsegmentation does in training.

    Args:
        path: 8-bit PNG of labels.
        model: From :func:`load_segmentor`.

    Returns:
        Class indices (H, W); 255 is void.

    Raises:
        DatasetError: If the file is no label map, or has labels that are no class of the model.
    """
    meta: dict[str, Any] = model.dataset_meta  # type: ignore[assignment]
    shape = read_label_map(path).shape
    source = {"seg_map_path": str(path), "seg_fields": [], **{k: meta[k] for k in ("reduce_zero_label", "label_map")}}
    labels: np.ndarray = LoadAnnotations()(source)["gt_seg_map"].reshape(shape)  # it drops sides of one pixel
    odd = np.unique(labels[(labels >= len(meta["classes"])) & (labels != VOID)])
    if odd.size:
        raise DatasetError(
            f"{path} has class {odd[0]}, the model {len(meta['classes'])} classes. Is it of this dataset?"
        )
    return labels


def class_iou(
    predictions: Sequence[np.ndarray], labels: Sequence[np.ndarray], num_classes: int
) -> dict[str, np.ndarray]:
    """Return IoU and accuracy per class over all images, with mmsegmentation's metric.

    Args:
        predictions: Class indices, one (H, W) per image.
        labels: The same; 255 is void.
        num_classes: Number of classes.

    Returns:
        ``IoU`` and ``Acc``, fractions, NaN for classes that do not occur, and ``pixels`` of the label; each
        (num_classes,).
    """
    areas = [
        IoUMetric.intersect_and_union(
            torch.from_numpy(p.astype(int)), torch.from_numpy(y.astype(int)), num_classes, VOID
        )
        for p, y in zip(predictions, labels, strict=True)
    ]
    totals = [sum(a[i].double() for a in areas) for i in range(4)]
    metrics = IoUMetric.total_area_to_metrics(*totals, ["mIoU"])
    return {"IoU": metrics["IoU"], "Acc": metrics["Acc"], "pixels": totals[3].long().numpy()}  # type: ignore[union-attr]


def write_class_iou(scores: dict[str, np.ndarray], classes: Sequence[str], path: str | Path) -> float:
    """Write a CSV with a row per class and one for the mean.

    Args:
        scores: From :func:`class_iou`.
        classes: Names of the classes.
        path: The file.

    Returns:
        The mean IoU in per cent, over the classes that occur in labels or predictions.
    """
    mean = {key: 100 * float(np.nanmean(scores[key])) for key in ("IoU", "Acc")}
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "IoU", "accuracy", "label pixels"])
        for name, *values, pixels in zip(classes, scores["IoU"], scores["Acc"], scores["pixels"], strict=True):
            writer.writerow([name, *("" if np.isnan(v) else f"{100 * v:.2f}" for v in values), pixels])
        writer.writerow(["mean", f"{mean['IoU']:.2f}", f"{mean['Acc']:.2f}", scores["pixels"].sum()])
    return mean["IoU"]


def plot_segmentation(
    image: str | Path, prediction: np.ndarray, labels: np.ndarray | None, meta: dict[str, Any], path: str | Path
) -> None:
    """Draw an image, the prediction over it with a legend, and the labels where there are some.

    Args:
        image: Image file.
        prediction: Class indices (H, W).
        labels: Class indices (H, W), 255 is void and stays uncoloured; or ``None``.
        meta: ``classes`` and ``palette``.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    with Image.open(image) as opened:
        pixels = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))  # as the model sees it
    maps = {"image": None, "prediction": prediction} | ({} if labels is None else {"label": labels})
    palette = np.asarray(meta["palette"], dtype=np.uint8)
    width = 4.0
    height = width * pixels.shape[0] / pixels.shape[1]
    figure = Figure(figsize=(width * len(maps) + 1.6, max(height, 1.5) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, classes) in zip(figure.subplots(1, len(maps)), maps.items(), strict=True):
        axes.set_axis_off()
        axes.set_title(title, fontsize=10)
        axes.imshow(_overlay(pixels, classes, palette))
    drawn = np.concatenate([m[m != VOID] for m in maps.values() if m is not None])
    counts = np.bincount(drawn, minlength=len(palette))
    shown = [int(i) for i in np.argsort(-counts, kind="stable")[:_LEGEND_ENTRIES] if counts[i]]
    handles = [Patch(color=palette[i] / 255, label=meta["classes"][i]) for i in shown]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def _overlay(pixels: np.ndarray, classes: np.ndarray | None, palette: np.ndarray, opacity: float = 0.6) -> np.ndarray:
    if classes is None:
        return pixels
    known = classes != VOID
    blended = pixels.astype(float)
    blended[known] = (1 - opacity) * blended[known] + opacity * palette[classes[known]]
    return blended.round().astype(np.uint8)
