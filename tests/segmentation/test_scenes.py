import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmseg")
from nepa_plugin.data.digits import TRAINING_DIGITS, digit_images
from nepa_plugin.segmentation.scenes import SCENE_CLASSES, digit_scenes


def test_layout_sizes_and_labels(tmp_path):
    root = digit_scenes(tmp_path / "scenes", num_training=3, num_validation=2, grid=(2, 3))
    for split, count in (("training", 3), ("validation", 2)):
        images, maps = (sorted((root / kind / split).iterdir()) for kind in ("images", "annotations"))
        assert [f.name for f in images] == [f.name for f in maps] == [f"{i:04d}.png" for i in range(count)]
        for image_path, map_path in zip(images, maps, strict=True):
            with Image.open(image_path) as image, Image.open(map_path) as label_map:
                assert image.size == label_map.size == (96, 64) and image.mode == "RGB"
                pixels, labels = np.asarray(image)[..., 0], np.asarray(label_map)
            assert labels.max() < 1 + len(SCENE_CLASSES)
            assert pixels[labels == 1].max() < 64 <= pixels[labels == 0].min()
            assert pixels[labels >= 2].min() >= 128


def test_the_class_of_a_digit_is_its_label(tmp_path):
    """Each cell holds the pixels of one digit; the nearest scan of that class must be nearer than those of others."""
    root = digit_scenes(tmp_path / "scenes", num_training=20, num_validation=1, grid=(2, 3))
    images, labels = digit_images(32)
    scans = np.stack([np.asarray(i) for i in images[:TRAINING_DIGITS]]).astype(float)
    right = total = 0
    for file in (root / "images" / "training").iterdir():
        pixels = np.asarray(Image.open(file))[..., 0]
        classes = np.asarray(Image.open(root / "annotations" / "training" / file.name))
        for row in range(0, 64, 32):
            for column in range(0, pixels.shape[1], 32):
                place = np.s_[row : row + 32, column : column + 32]
                found = np.unique(classes[place])
                found = found[found >= 2]
                if not found.size:
                    continue
                assert len(found) == 1  # one digit in each cell
                ys, xs = np.nonzero(classes[place] != 1)
                cut = Image.fromarray(pixels[place][ys.min() : ys.max() + 1, xs.min() : xs.max() + 1])
                nearest = np.array(
                    [np.abs(np.asarray(cut.resize((32, 32))) - _tight(scan)).sum() for scan in scans[::7]]
                )
                right += labels[:TRAINING_DIGITS:7][nearest.argmin()] == found[0] - 2
                total += 1
    assert total > 50 and right / total > 0.7


def _tight(scan):
    ys, xs = np.nonzero(scan >= 64)
    cut = Image.fromarray(scan[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].astype(np.uint8))
    return np.asarray(cut.resize((32, 32)), dtype=float)


def test_the_seed_decides(tmp_path):
    first, again, other = (
        digit_scenes(tmp_path / name, 1, 1, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    file = "images/training/0000.png"
    assert (first / file).read_bytes() == (again / file).read_bytes() != (other / file).read_bytes()


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "scenes").mkdir()
    with pytest.raises(FileExistsError, match="left as it is"):
        digit_scenes(tmp_path / "scenes", 1, 1)
    assert not list((tmp_path / "scenes").iterdir())
