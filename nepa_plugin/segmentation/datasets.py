"""Segmentation datasets in ADE20K's folder layout that are checked before training starts."""

import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from mmengine.logging import print_log
from mmseg.datasets import ADE20KDataset, BaseSegDataset
from mmseg.registry import DATASETS
from PIL import Image

from nepa_plugin.segmentation.errors import DatasetError
from nepa_plugin.segmentation.scenes import SCENE_CLASSES

_SAMPLE = 64  # label maps that are read before training; all 20,000 of ADE20K would take minutes
#: The label of pixels that do not count, in label maps and in metrics.
VOID = 255


@DATASETS.register_module()
class SegmentationFolder(BaseSegDataset):
    """Images and label maps of equal names in two folders, checked when the dataset is built.

    Label maps are 8-bit PNGs of class indices. 255 is void. With ``reduce_zero_label`` 0 is void too and classes count
    from 1, as in ADE20K. For your own images:
    ``dict(type='SegmentationFolder', metainfo=dict(classes=('sky', 'road')), data_root=..., data_prefix=...)``.

    Args:
        reduce_zero_label: Whether label 0 is void. Datasets whose labels are known take only the right value.
        **kwargs: Arguments of mmsegmentation's ``BaseSegDataset``.

    Raises:
        DatasetError: On a missing or empty folder, images without label map, maps of another size than their image, or
            labels that are no class.
    """

    #: Whether label 0 is void, where that is known.
    zero_is_void: ClassVar[bool | None] = None
    #: How to get the dataset.
    source: ClassVar[str] = "Set data_root and data_prefix of the dataset."

    def __init__(self, reduce_zero_label: bool | None = None, **kwargs: Any) -> None:
        name = type(self).__name__
        if reduce_zero_label is None:
            reduce_zero_label = bool(self.zero_is_void)
        elif self.zero_is_void is not None and reduce_zero_label != self.zero_is_void:
            meaning = "void and classes count from 1" if self.zero_is_void else "the first class"
            raise DatasetError(
                f"{name}: label 0 is {meaning}; set reduce_zero_label={self.zero_is_void} or leave it out."
            )
        for transform in kwargs.get("pipeline", []):
            if isinstance(transform, dict) and transform.get("type") == "LoadAnnotations":
                own = transform.get("reduce_zero_label")
                if own is not None and own != reduce_zero_label:
                    raise DatasetError(
                        f"{name}: the pipeline's LoadAnnotations has reduce_zero_label={own}, the dataset has "
                        f"{reduce_zero_label}. Leave it out of the pipeline."
                    )
        super().__init__(reduce_zero_label=reduce_zero_label, **kwargs)

    def load_data_list(self) -> list[dict]:
        """List the images, and check them and their label maps."""
        if self.backend_args is not None:  # not on this disk
            return list(super().load_data_list())
        folders = [self.data_prefix[key] for key in ("img_path", "seg_map_path") if self.data_prefix.get(key)]
        for folder in folders:
            if not os.path.isdir(folder):
                raise DatasetError(f"{type(self).__name__}: no folder at {folder}. {self.source}")
        data = list(super().load_data_list())
        if not data:
            raise DatasetError(f"{type(self).__name__}: no *{self.img_suffix} in {folders[0]}. {self.source}")
        labelled = [d for d in data if "seg_map_path" in d]
        missing = [d["seg_map_path"] for d in labelled if not os.path.isfile(d["seg_map_path"])]
        if missing:
            raise DatasetError(
                f"{type(self).__name__}: {len(missing)} of {len(data)} images have no label map, first: "
                f"{', '.join(missing[:3])}. Add the maps or remove the images."
            )
        if labelled:
            self._check_labels(labelled)
        return data

    def _check_labels(self, data: list[dict]) -> None:
        name, reduce = type(self).__name__, int(self.reduce_zero_label)
        classes = self.METAINFO.get("classes") or self.metainfo.get("classes")
        if classes is None:
            raise DatasetError(f"{name}: give metainfo=dict(classes=(...)).")
        highest, found = len(classes) - 1 + reduce, np.zeros(256, dtype=bool)
        for item in data[:: -(-len(data) // _SAMPLE)]:
            path = item["seg_map_path"]
            try:
                with Image.open(item["img_path"]) as image:
                    image_size = image.size
            except OSError as error:
                raise DatasetError(f"{name}: cannot read the image {item['img_path']}: {error}") from error
            labels = read_label_map(path)
            if labels.shape != image_size[::-1]:
                raise DatasetError(f"{name}: {path} is {labels.shape[::-1]} pixels, its image {image_size}.")
            values = np.unique(labels)
            odd = values[(values > highest) & (values != VOID)]
            if odd.size:
                raise DatasetError(
                    f"{name}: {path} has label {odd[0]}; {len(classes)} classes with reduce_zero_label={bool(reduce)} "
                    f"are labels {reduce} to {highest}. Check the classes, reduce_zero_label and the folder."
                )
            found[values] = True
        if reduce and found[0] and not found[highest]:
            print_log(
                f"{name}: no label {highest} ({classes[-1]}) in the label maps that were sampled. If labels count from "
                "0, reduce_zero_label must be False.",
                logger="current",
                level=30,
            )


@DATASETS.register_module()
class ADE20K(SegmentationFolder):
    """ADE20K (SceneParse150): 150 classes, 20,210 training and 2,000 validation images."""

    METAINFO = ADE20KDataset.METAINFO
    zero_is_void = True
    source = (
        "ADE20K is ADEChallengeData2016.zip of the MIT Scene Parsing Benchmark: unpack it to data/ade, or set the "
        "environment variable ADE20K to the folder that holds images and annotations."
    )


@DATASETS.register_module()
class CamVid(SegmentationFolder):
    """CamVid street scenes with the usual 11 classes."""

    METAINFO: ClassVar[dict] = {
        "classes": (
            *("Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian"),
            "Bicyclist",
        ),
        # the colours of CamVid's own label maps
        "palette": [
            *([128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222], [128, 128, 0]),
            *([192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192]),
        ],
    }
    zero_is_void = False
    source = (
        "CamVid as images/{training,validation}/*.jpg and annotations/{training,validation}/*.png with labels 0 to 10 "
        "goes to data/camvid, or set the environment variable CAMVID to its folder."
    )


@DATASETS.register_module()
class DigitScenes(SegmentationFolder):
    """The embedded demo, written by ``tools/make_digit_scenes.py``."""

    METAINFO: ClassVar[dict] = {
        "classes": SCENE_CLASSES,
        "palette": [
            *([60, 60, 60], [31, 119, 180], [255, 127, 14], [44, 160, 44], [214, 39, 40], [148, 103, 189]),
            *([140, 86, 75], [227, 119, 194], [188, 189, 34], [23, 190, 207], [255, 221, 87]),
        ],
    }
    zero_is_void = True
    source = "Write it with: python tools/make_digit_scenes.py data/digit_scenes"

    def __init__(self, img_suffix: str = ".png", **kwargs: Any) -> None:
        super().__init__(img_suffix=img_suffix, **kwargs)


def read_label_map(path: str | Path) -> np.ndarray:
    """Read an 8-bit map of class indices.

    Args:
        path: PNG of one channel.

    Returns:
        Labels (H, W) as they are in the file, uint8.

    Raises:
        DatasetError: If the file is no such map.
    """
    try:
        with Image.open(path) as label_map:
            labels = np.asarray(label_map)
    except OSError as error:
        raise DatasetError(f"Cannot read the label map {path}: {error}") from error
    if labels.ndim != 2 or labels.dtype != np.uint8:
        raise DatasetError(f"{path} is not an 8-bit map of class indices, but {labels.dtype} {labels.shape}.")
    return labels


def label_map_of(image: str | Path) -> Path | None:
    """Return where ADE20K's layout has the label map of an image, ``.../images/X.jpg`` -> ``.../annotations/X.png``.

    Args:
        image: Path of an image.

    Returns:
        The path, or ``None`` where there is no such file.
    """
    parts = list(Path(image).absolute().parts)
    if "images" not in parts:
        return None
    last = len(parts) - 1 - parts[::-1].index("images")
    path = Path(*parts[:last], "annotations", *parts[last + 1 :]).with_suffix(".png")
    return path if path.is_file() else None
