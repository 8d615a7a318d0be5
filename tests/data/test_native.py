"""Images at their own aspect ratio and size: grids, batches of one grid each, and a run."""

import math

import pytest
import torch
import yaml
from PIL import Image
from pretraining import curve, run
from sklearn.datasets import load_sample_images

from nepa_plugin.data.module import ImageData
from nepa_plugin.data.native import GridBatchSampler, grid_of, merged
from nepa_plugin.data.samples import EpochBatchSampler
from nepa_plugin.data.transforms import NEPATransform, crop_flip
from nepa_plugin.methods import NEPA
from nepa_plugin.methods.cost import training_cost

SIZES = [(96, 64), (64, 96), (80, 80)]
ANY_SIZE = ("--model.backbone_args.dynamic_img_size", "true")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Parts of scikit-learn's two photographs, 20 of each size and one strip."""
    folder = tmp_path_factory.mktemp("photos")
    pictures = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for i in range(61):
        width, height = SIZES[i % 3] if i < 60 else (200, 20)
        left, top = 37 * i % (640 - width), 53 * i % (427 - height)
        pictures[i % 2].crop((left, top, left + width, top + height)).save(folder / f"{i:03d}.png")
    return folder


@pytest.mark.parametrize(
    ("width", "height", "max_tokens", "min_side", "grid"),
    [
        (224, 224, 256, None, (16, 16)),
        (500, 375, 256, None, (14, 18)),
        (375, 500, 256, None, (18, 14)),
        (640, 427, 256, 112, (13, 19)),
        (32, 32, 256, None, (2, 2)),  # is not enlarged
        (32, 32, 256, 112, (8, 8)),
        (3000, 40, 256, 112, (8, 32)),  # the longer side is cut
        (9000, 20, 256, None, (1, 256)),
        (20, 9000, 256, None, (256, 1)),
        (10, 10, 256, None, (1, 1)),
    ],
)
def test_grids_have_the_images_aspect_ratio_and_no_more_patches_than_allowed(width, height, max_tokens, min_side, grid):
    assert grid_of(width, height, (14, 14), max_tokens, min_side) == grid


def test_every_grid_fits():
    for width in range(1, 1200, 37):
        for height in range(1, 1200, 41):
            rows, columns = grid_of(width, height, (14, 16), 100, 48)
            assert rows * columns <= 100
            if 1 / 3 < width / height < 3 and min(width, height) > 48:
                assert abs(math.log((columns * 16 / rows / 14) / (width / height))) < 0.4


def test_a_rare_grid_gives_way_to_the_nearest():
    grids = [(8, 8)] * 5 + [(4, 16)] * 5 + [(4, 14)] * 2 + [(7, 8)]
    assert merged(grids, 4) == [(8, 8)] * 5 + [(4, 16)] * 7 + [(8, 8)]
    assert len(set(merged(grids, 13))) == 1


def test_batches_of_one_grid_are_those_of_square_images():
    ours = GridBatchSampler([(8, 8)] * 50, 4, 7, 1, 2, lambda length: (3, 2), 2)
    theirs = EpochBatchSampler(50, 4, 7, 1, 2, lambda length: (3, 2), 2)
    assert len(ours) == len(theirs) == 6
    assert list(ours) == list(theirs)


def test_every_batch_has_one_grid_and_processes_share_it():
    grids = [[(8, 8), (4, 16), (16, 4)][i % 3] for i in range(100)]
    ranks = [list(GridBatchSampler(grids, 4, 7, rank, 2)) for rank in range(2)]
    one = list(GridBatchSampler(grids, 8, 7))
    assert len(one) == 4 + 4 + 4
    for whole, *parts in zip(one, *ranks, strict=True):
        assert [key for part in parts for key in part] == whole
        assert len({grids[i] for _, i in whole}) == 1
    seen = [i for batch in one for _, i in batch]
    assert len(set(seen)) == len(seen)
    assert len({grids[batch[0][1]] for batch in one[:4]}) > 1  # one grid after the other would be an order
    rest = list(GridBatchSampler(grids, 8, 7, position=lambda length: (0, 5)))
    assert rest == one[5:]


def test_crops_are_not_distorted():
    augmentation = crop_flip(NEPATransform((32, 96)))
    assert augmentation.ratio == (3 * 3 / 4, 3 * 4 / 3)
    assert crop_flip(NEPATransform(32)).ratio == (3 / 4, 4 / 3)


NATIVE = (
    *("--data.demo", "null", "--data.max_tokens", "64", "--data.min_side", "32", "--model.img_size", "64"),
    *("--model.patch_size", "8", "--data.batch_size_per_device", "6", "--global_batch_size", "6"),
)


def test_a_run_sees_each_image_at_its_own_size_and_resumes_exactly(photos, tmp_path, caplog):
    caplog.set_level("INFO")
    arguments = (*NATIVE, *ANY_SIZE, "--data.train_dir", photos, "--checkpoint_every_n_steps", "4")
    run(*arguments, "--run_dir", tmp_path / "whole")
    summary = yaml.safe_load((tmp_path / "whole" / "summary.json").read_text())
    assert summary["train_sizes"] == {"80x48": 21, "48x80": 20, "64x64": 20}
    assert summary["steps"] == 2 * 9
    assert "80x48 pixels (21 images), 48x80 pixels (20 images), 64x64 pixels (20 images)" in caplog.text
    assert summary["encoder_tokens"] == pytest.approx(1 + (41 * 60 + 20 * 64) / 61)
    run(*arguments, "--run_dir", tmp_path / "rest", "--ckpt_path", tmp_path / "whole" / "checkpoints" / "previous.ckpt")
    whole, rest = curve(tmp_path / "whole"), curve(tmp_path / "rest")
    assert list(rest) == [16, 17]
    assert rest == {step: whole[step] for step in rest}


def test_each_batch_is_of_the_size_it_says(photos, monkeypatch):
    method = NEPA(
        backbone="nepa_vit_tiny_patch14_224",
        img_size=64,
        patch_size=8,
        backbone_args={"embed_dim": 32, "depth": 1, "num_heads": 2, "dynamic_img_size": True},
    )
    data = ImageData(train_dir=str(photos), batch_size_per_device=6, max_tokens=64, num_workers=0)
    data.check_method(method)
    data.check_images()
    data.check_batch(1)

    class Trainer:
        lightning_module, global_rank, world_size, accumulate_grad_batches = method, 0, 1, 1
        num_devices, limit_train_batches, fit_loop = 1, 1.0, None

    data.trainer = Trainer()
    data._position = lambda length: (0, 0)
    monkeypatch.setattr(ImageData, "_pin_memory", False)
    shapes = [tuple(batch[0][0].shape) for batch in data.train_dataloader()]
    assert {shape[2:] for shape in shapes} == {(48, 80), (80, 48), (64, 64)}
    losses = [method.step([torch.rand(*shape)])[0] for shape in shapes]
    assert all(loss.isfinite() for loss in losses)


def test_cost_is_the_mean_over_the_images():
    method = NEPA(
        backbone="nepa_vit_tiny_patch14_224",
        img_size=32,
        patch_size=4,
        backbone_args={"embed_dim": 32, "depth": 2, "num_heads": 2, "dynamic_img_size": True},
    )
    small, large = (training_cost(method, sizes={size: 1}) for size in ((16, 16), (32, 32)))
    assert large == training_cost(method)
    assert (small.encoder_tokens, large.encoder_tokens) == (17, 65)
    both = training_cost(method, sizes={(16, 16): 3, (32, 32): 1})
    assert both.gflops == pytest.approx((3 * small.gflops + large.gflops) / 4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--model.backbone_args.dynamic_img_size true"),
        ((*ANY_SIZE, "--model", "CPC"), "data.max_tokens: CPC takes square images alone"),
        ((*ANY_SIZE, "--model.input_mask_ratio", "0.5"), "input_mask_ratio draws masks of one size"),
        ((*ANY_SIZE, "--data.pipeline", "tensor"), "data.max_tokens does not go with data.pipeline tensor"),
        ((*ANY_SIZE, "--data.max_tokens", "null"), "data.min_side goes with images and data.max_tokens"),
        ((*ANY_SIZE, "--model.horizon", "61"), "looks 61 ahead needs at least 62 tokens per image"),
        ((*ANY_SIZE, "--data.batch_size_per_device", "70", "--global_batch_size", "70"), "61 images are fewer than"),
        ((*ANY_SIZE, "--global_batch_size", "60"), "There are not 10 batches of 6 images of one size"),
    ],
)
def test_what_does_not_go_together_is_one_line(photos, tmp_path, arguments, said, capsys):
    run(*NATIVE, "--data.train_dir", photos, *arguments, "--run_dir", tmp_path / "run", code=2)
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()
