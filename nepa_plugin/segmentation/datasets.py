"""Segmentation datasets in ADE20K's folder layout that are checked before training starts."""

import os
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from mmengine.logging import print_log
from mmseg.datasets import ADE20KDataset, BaseSegDataset
from mmseg.registry import DATASETS
from PIL import ExifTags, Image

from nepa_plugin.data.extensions import IMAGE_EXTENSIONS
from nepa_plugin.segmentation.errors import DatasetError
from nepa_plugin.segmentation.resuming import Draw
from nepa_plugin.segmentation.scenes import SCENE_CLASSES

_SAMPLE = 64  # label maps that are read before training; all 20,000 of ADE20K would take minutes
#: Seconds in which more of them are read while there is a class that none has shown.
_SECONDS = 20.0
#: The label of pixels that do not count, in label maps and in metrics.
VOID = 255


@DATASETS.register_module()
class SegmentationFolder(BaseSegDataset):
    """Images and label maps of equal names in two folders, checked when the dataset is built.

    Label maps are 8-bit PNGs of class indices. 255 is void. With ``reduce_zero_label`` 0 is void too and classes count
    from 1, as in ADE20K. For your own images:
    ``dict(type='SegmentationFolder', metainfo=dict(classes=('sky', 'road')), data_root=..., data_prefix=...)``.

    Every image file of the folder is used, whatever its suffix; what is left out is counted and said. A photograph with
    an EXIF orientation is taken as it is shown, as OpenCV and mmcv read it, and its label map must be of that size.

    Args:
        img_suffix: Take only the images with this ending, such as ``.jpg``; by default all.
        label_map: Value in the label maps -> class, as ``{255: 1}`` for masks of 0 and 255. Other values stay.
        reduce_zero_label: Whether label 0 is void. Datasets whose labels are known take only the right value.
        **kwargs: Arguments of mmsegmentation's ``BaseSegDataset``.

    Raises:
        DatasetError: On a missing or empty folder, images without label map, maps of another size than their image,
            labels that are no class, or maps in which only void or a single one of two classes occurs beside void.
    """

    #: Whether label 0 is void, where that is known.
    zero_is_void: ClassVar[bool | None] = None
    #: How to get the dataset.
    source: ClassVar[str] = "Set data_root and data_prefix of the dataset."

    def __init__(
        self,
        reduce_zero_label: bool | None = None,
        img_suffix: str | None = None,
        label_map: dict[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        name = type(self).__name__
        self._suffixes = IMAGE_EXTENSIONS if img_suffix is None else (img_suffix.lower(),)
        try:
            self._values = {int(value): int(label) for value, label in (label_map or {}).items()}
        except (AttributeError, TypeError, ValueError):
            raise DatasetError(f"{name}: label_map={label_map!r} is no mapping such as {{255: 1}}.") from None
        if self._values and reduce_zero_label:
            raise DatasetError(f"{name}: give label_map or reduce_zero_label=True, not both: map 0 to {VOID} there.")
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
        super().__init__(reduce_zero_label=reduce_zero_label, img_suffix=img_suffix or ".jpg", **kwargs)

    def prepare_data(self, idx: int) -> Any:
        """Read and augment an image, with the random numbers of its draw: see :class:`~.resuming.ResumableSampler`."""
        if isinstance(idx, Draw):
            idx.seed_generators()
        return super().prepare_data(int(idx))

    def load_data_list(self) -> list[dict]:
        """List the images, and check them and their label maps."""
        if self._values:
            if self.label_map is not None:  # type: ignore[has-type]
                raise DatasetError(f"{type(self).__name__}: give label_map or a choice of its classes, not both.")
            self.label_map = self._values
            self._metainfo["label_map"] = self._values
        if self.backend_args is not None:  # not on this disk
            return list(super().load_data_list())
        folders = [self.data_prefix[key] for key in ("img_path", "seg_map_path") if self.data_prefix.get(key)]
        for folder in folders:
            if not os.path.isdir(folder):
                raise DatasetError(f"{type(self).__name__}: no folder at {folder}. {self.source}")
        data = list(super().load_data_list()) if self.ann_file else self._list_folder(*folders)
        if not data:
            wanted = ", ".join(f"*{suffix}" for suffix in self._suffixes)
            raise DatasetError(f"{type(self).__name__}: no {wanted} in {folders[0]}. {self.source}")
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

    def _list_folder(self, images: str, label_maps: str | None = None) -> list[dict]:
        """Return the images of a folder with their label maps, by name; say what is left out."""
        name, files = type(self).__name__, _files(images)
        taken = [file for file in files if file.lower().endswith(self._suffixes)]
        self._say_left_out(
            len(files) - len(taken), sorted(set(files) - set(taken)), images, "is no image of this dataset"
        )
        data: list[dict] = []
        of_map: dict[str, str] = {}
        for file in taken:
            item = {"img_path": os.path.join(images, file)}
            if label_maps is not None:
                own = next(suffix for suffix in self._suffixes if file.lower().endswith(suffix))
                label_map = file[: -len(own)] + self.seg_map_suffix
                if label_map in of_map:
                    raise DatasetError(
                        f"{name}: {of_map[label_map]} and {file} in {images} would have the same label map "
                        f"{label_map}. Remove one, or set img_suffix."
                    )
                of_map[label_map] = file
                item["seg_map_path"] = os.path.join(label_maps, label_map)
            data.append(
                item | {"label_map": self.label_map, "reduce_zero_label": self.reduce_zero_label, "seg_fields": []}
            )
        if label_maps is not None:
            alone = [file for file in _files(label_maps) if file.endswith(self.seg_map_suffix) and file not in of_map]
            self._say_left_out(len(alone), alone, label_maps, "is the label map of no image")
        return data

    def _say_left_out(self, count: int, files: list[str], folder: str, what: str) -> None:
        if count:
            text = f"{type(self).__name__}: {count} file(s) in {folder} are left out; {files[0]} {what}."
            print_log(text, logger="current", level=30)

    def _check_labels(self, data: list[dict]) -> None:
        name = type(self).__name__
        classes = self.METAINFO.get("classes") or self.metainfo.get("classes")
        if classes is None:
            raise DatasetError(f"{name}: give metainfo=dict(classes=(...)).")
        sample = range(0, len(data), -(-len(data) // _SAMPLE))
        pixels, read = np.zeros(256, dtype=np.int64), 0
        for i in sample:
            pixels += self._count(data[i], len(classes), check_image=True)
            read += 1
        end = time.monotonic() + _SECONDS
        for i in np.random.default_rng(0).permutation(len(data)):
            missing = self._classes_missing(pixels, len(classes))
            if not missing or time.monotonic() > end:
                break
            if int(i) not in sample:
                pixels += self._count(data[i], len(classes))
                read += 1
        self._judge(
            pixels, classes, f"the {read} label maps" + (f" of {len(data)} that were read" if read < len(data) else "")
        )

    def _count(self, item: dict, num_classes: int, check_image: bool = False) -> np.ndarray:
        """Return how many pixels have each value of a label map, having checked them."""
        name, path, reduce = type(self).__name__, item["seg_map_path"], int(self.reduce_zero_label)
        labels = read_label_map(path)
        if check_image:
            try:
                with Image.open(item["img_path"]) as image:
                    stored, shown = image.size, shown_size(image)
            except OSError as error:
                raise DatasetError(f"{name}: cannot read the image {item['img_path']}: {error}") from error
            if labels.shape != shown[::-1]:
                turned = (
                    " as it is shown: it has an EXIF orientation, which OpenCV follows and the label map does not. "
                    "Turn the label map, or store the image turned"
                )
                why = turned if stored != shown else ""
                raise DatasetError(f"{name}: {path} is {labels.shape[::-1]} pixels, its image {shown}{why}.")
        highest = num_classes - 1 + reduce
        counts = np.bincount(labels.ravel(), minlength=256)
        odd = [int(v) for v in np.flatnonzero(counts) if not (self._values.get(int(v), int(v)) <= highest or v == VOID)]
        if odd:
            raise DatasetError(
                f"{name}: {path} has label {odd[0]}; {num_classes} classes with reduce_zero_label={bool(reduce)} "
                f"are labels {reduce} to {highest}. Its values: {_shares(counts)}. Check the classes, "
                "reduce_zero_label and the folder, or map values to classes with label_map={VALUE: CLASS}."
            )
        return counts

    def _classes_missing(self, pixels: np.ndarray, num_classes: int) -> list[int]:
        """Return the classes that have no pixel."""
        of_label = np.zeros(256, dtype=np.int64)
        for value in np.flatnonzero(pixels):
            of_label[self._values.get(int(value), int(value))] += pixels[value]
        of_label = np.roll(of_label, -int(self.reduce_zero_label))
        return [c for c in range(num_classes) if not of_label[c]]

    def _judge(self, pixels: np.ndarray, classes: Any, read: str) -> None:
        """Refuse labels from which nothing can be learned, and point out classes that never occur."""
        name, missing = type(self).__name__, self._classes_missing(pixels, len(classes))
        if not missing:
            return
        found, reduce = f"Values found: {_shares(pixels)}.", bool(self.reduce_zero_label)
        how = f"{VOID} is void, which is never learned or scored; if it is a class, map it: label_map={{{VOID}: 1}}."
        if len(missing) == len(classes):
            raise DatasetError(f"{name}: {read} hold no class, only void. {found} {how}")
        if len(classes) == 2 and pixels[VOID] and not reduce and VOID not in self._values:
            raise DatasetError(f"{name}: {read} never hold {classes[missing[0]]}. {found} {how}")
        if self.test_mode:
            return
        text = f"{name}: {read} never hold {', '.join(str(classes[c]) for c in missing[:6])}"
        text += f" and {len(missing) - 6} more" if len(missing) > 6 else ""
        advice = "Check the classes, or map values to classes with label_map={VALUE: CLASS}."
        if reduce and pixels[0] and not pixels[len(classes)]:
            advice = f"No label is {len(classes)}: if labels count from 0, reduce_zero_label must be False."
        print_log(f"{text}. {found} {advice}", logger="current", level=30)


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


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Return an image's width and height as it is shown, and as OpenCV and mmcv read it: with EXIF's turns."""
    width, height = image.size
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def _shares(pixels: np.ndarray, most: int = 8) -> str:
    """Return values and their shares of all pixels, the most frequent first."""
    order = [int(v) for v in np.argsort(-pixels, kind="stable") if pixels[v]]
    shown = ", ".join(f"{v} ({100 * pixels[v] / pixels.sum():.1f} %)" for v in order[:most])
    return shown + (f" and {len(order) - most} more" if len(order) > most else "")


def _files(folder: str) -> list[str]:
    """Return all files below a folder, by their paths from there; hidden ones, and circles of links, are left out."""
    found, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [os.path.relpath(os.path.join(place, file), folder) for file in files if not file.startswith(".")]
    return sorted(found)


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
