"""Segment images: a picture of each (image, prediction, label where there is one), and the IoU per class as CSV.

python tools/segment.py mmseg_configs/nepa_vit_b_ade20k.py work_dirs/x/best_mIoU_iter_160000.pth street.jpg

An image .../images/X.jpg is compared with .../annotations/X.png, where there is such a file.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="mmengine config that the checkpoint was trained with")
    parser.add_argument("checkpoint", help=".pth of the run")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--out", type=Path, default=Path("segmentation"), help="folder for pictures and class_iou.csv")
    args = parser.parse_args()
    try:
        if missing := [str(image) for image in args.images if not image.is_file()]:
            raise FileNotFoundError(f"no image file at {', '.join(missing[:3])}.")
        model = load_segmentor(args.config, args.checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
        for image in args.images:
            size, label_map = check_image(image), label_map_of(image)
            if label_map is not None and check_image(label_map) != size:
                raise ValueError(f"{label_map} has another size than its image {image}.")
        args.out.mkdir(parents=True, exist_ok=True)
        scored: list[tuple[np.ndarray, np.ndarray]] = []
        for i, image in enumerate(args.images):
            prediction, path = predict(model, image), label_map_of(image)
            labels = None if path is None else read_labels(path, model)
            picture = args.out / f"{i:03d}_{image.stem}.png"
            plot_segmentation(image, prediction, labels, model.dataset_meta, picture)
            print(f"Wrote {picture}")
            if labels is not None:
                scored.append((prediction, labels))
        if scored:
            classes = model.dataset_meta["classes"]
            table = args.out / "class_iou.csv"
            mean = write_class_iou(class_iou(*zip(*scored, strict=True), len(classes)), classes, table)
            print(f"mIoU {mean:.1f} % over {len(scored)} image(s) with labels. Wrote {table}")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
