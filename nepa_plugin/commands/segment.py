"""Segment images: a picture of each (image, prediction, label where there is one), and the IoU per class as CSV.

nepa segment nepa_vit_b_ade20k work_dirs/x/best_mIoU_iter_160000.pth street.jpg

An image .../images/X.jpg is compared with .../annotations/X.png, where there is such a file.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from nepa_plugin.commands.boundary import errors_in_one_line
from nepa_plugin.commands.naming import command_parser
from nepa_plugin.runtime.places import check_folder
from nepa_plugin.runtime.shipped import find
from nepa_plugin.segmentation.datasets import label_map_of
from nepa_plugin.segmentation.inference import (
    check_image,
    class_iou,
    load_segmentor,
    plot_segmentation,
    predict,
    read_labels,
    write_class_iou,
)


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: Command line arguments; ``sys.argv`` by default.

    Raises:
        SystemExit: With status 2 and one line on stderr if the input is bad.
    """
    parser = command_parser("segment", __doc__, args)
    parser.add_argument("config", help="file, or name, of the mmengine config that the checkpoint was trained with")
    parser.add_argument("checkpoint", help=".pth of the run")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--out", type=Path, default=Path("segmentation"), help="folder for pictures and class_iou.csv")
    given = parser.parse_args(args)
    with errors_in_one_line():
        check_folder(given.out)
        if missing := [str(image) for image in given.images if not image.is_file()]:
            raise FileNotFoundError(f"no image file at {', '.join(missing[:3])}.")
        config, device = find(given.config, "mmseg_configs"), "cuda" if torch.cuda.is_available() else "cpu"
        model = load_segmentor(config, given.checkpoint, device)
        meta: dict[str, Any] = model.dataset_meta  # type: ignore[assignment]
        for image in given.images:
            size, label_map = check_image(image), label_map_of(image)
            if label_map is not None and read_labels(label_map, model).shape != size:
                raise ValueError(f"{label_map} has another size than its image {image}.")
        given.out.mkdir(parents=True, exist_ok=True)
        scored: list[tuple[np.ndarray, np.ndarray]] = []
        for i, image in enumerate(given.images):
            prediction, path = predict(model, image), label_map_of(image)
            labels = None if path is None else read_labels(path, model)
            picture = given.out / f"{i:03d}_{image.stem}.png"
            plot_segmentation(image, prediction, labels, meta, picture)
            print(f"Wrote {picture}")
            if labels is not None:
                scored.append((prediction, labels))
        if scored:
            classes, table = meta["classes"], given.out / "class_iou.csv"
            predictions, labels_of = zip(*scored, strict=True)
            scores = class_iou(predictions, labels_of, len(classes))
            mean = write_class_iou(scores, classes, table)
            counted = int(np.isfinite(scores["IoU"]).sum())
            print(
                f"mIoU {mean:.1f} % over {len(scored)} image(s) with labels, the mean of {counted} of {len(classes)} "
                f"classes. Wrote {table}"
            )
