"""The three pipelines: the same crops, almost the same pixels, and everything exact that has to be."""

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightly.data import LightlyDataset
from lightly.transforms import MAETransform
from photos import photo_folder, photos
from PIL import Image
from recorder import record
from torch.utils.data import DataLoader
from torchvision.transforms import functional as F

from nepa_plugin.data import DataError, ImageData, NEPATransform, SeededDataset
from nepa_plugin.data.packing import make_shards
from nepa_plugin.data.pipelines import FileDataset, MaskedPipeline, PipelineDataset, build_pipeline, decode
from nepa_plugin.methods.masked import SingleView
from nepa_plugin.training.callbacks import LastCheckpoint
from nepa_plugin.training.cli import main

ROOT = Path(__file__).parents[2]
FAST = ["tensor", "device"]
CPU = torch.device("cpu")


def file_bytes(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def as_pil(data):
    return F.pil_to_tensor(Image.open(io.BytesIO(data.numpy().tobytes())).convert("RGB"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return photo_folder(tmp_path_factory.mktemp("photos") / "images", 16)


# -- decoding ----------------------------------------------------------------------------------------------------------


def cmyk(image):
    return image.convert("CMYK")


def with_alpha(image):
    image = image.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def sixteen_bits(image):
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


@pytest.mark.parametrize(
    ("change", "format", "options"),
    [
        (lambda image: image, "JPEG", {"quality": 90}),
        (lambda image: image, "JPEG", {"quality": 90, "subsampling": 0}),
        (lambda image: image, "JPEG", {"quality": 75, "progressive": True}),
        (lambda image: image.convert("L"), "JPEG", {}),
        (cmyk, "JPEG", {}),
        (lambda image: image, "PNG", {}),
        (lambda image: image.quantize(16), "PNG", {"transparency": 3}),
        (with_alpha, "PNG", {}),
        (sixteen_bits, "PNG", {}),
        (lambda image: image, "TIFF", {}),
        (cmyk, "TIFF", {}),
        (lambda image: image, "BMP", {}),
        (lambda image: image, "PPM", {}),
        (with_alpha, "WEBP", {"quality": 80}),
    ],
)
def test_every_format_is_decoded_as_pil_does(change, format, options):
    for image in photos(3):
        data = file_bytes(change(image), format, **options)
        pixels = decode(data)
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, image.height, image.width)
        difference = (pixels.int() - as_pil(data).int()).abs()
        assert difference.max() <= (1 if format == "JPEG" else 0)  # two builds of libjpeg
        assert difference.float().mean() < 0.01


def test_exif_orientation_is_ignored_as_with_pil():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    data = file_bytes(photos(1)[0], "JPEG", exif=exif)
    assert decode(data).shape == as_pil(data).shape == (3, 390, 470)


# -- pixels ------------------------------------------------------------------------------------------------------------


def finished(name, transform, images, keys):
    pipeline = build_pipeline(name, transform, "NEPA")
    samples = [(pipeline.view(pipeline.load(data), key), 0, "x") for data, key in zip(images, keys, strict=True)]
    views, labels, names = pipeline.collate(samples)
    (view,) = pipeline.finish(views, labels.device, names)
    assert view.dtype == torch.float32 and view.is_contiguous()
    return view


@pytest.mark.parametrize(
    ("transform", "bounds"),
    [
        # Of 255 levels, (largest, mean). PIL rounds to whole levels after each direction; "device" never rounds.
        (NEPATransform((64, 48)), {"tensor": (1.01, 0.1), "device": (1.01, 0.35)}),
        # Bicubic weights overshoot, and PIL clips in between: at a few edges the results are further apart.
        (SingleView(MAETransform, 64), {"tensor": (16, 0.1), "device": (16, 0.35)}),
    ],
    ids=["bilinear", "bicubic"],
)
def test_the_same_draws_give_almost_the_same_pixels(transform, bounds):
    images = [file_bytes(image, "JPEG", quality=92) for image in photos(32)]
    images[3] = file_bytes(photos(4)[3].convert("L"), "JPEG")
    images[5] = file_bytes(photos(6)[5], "PNG")
    keys = [(7, 1, i) for i in range(32)]
    expected = finished("pil", transform, images, keys)
    for name, (largest, mean) in bounds.items():
        levels = (finished(name, transform, images, keys) - expected).abs() * 127.5
        assert levels.max() <= largest and levels.mean() <= mean, (name, levels.max(), levels.mean())
        assert (levels > 1.01).float().mean() < 1e-3
        # Other draws, or a flip the wrong way, are far outside the bounds.
        other = finished(name, transform, images, [(7, 2, i) for i in range(32)])
        assert (other - expected).abs().mean() * 127.5 > 10


@pytest.mark.parametrize("name", FAST)
def test_normalisation_is_that_of_the_transform(name):
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    transform = NEPATransform(16, (1.0, 1.0), 0.0, mean, std)
    for value in (0, 100, 255):
        view = finished(name, transform, [file_bytes(Image.new("RGB", (16, 16), (value,) * 3), "PNG")], [(0, 0, 0)])
        expected = (value / 255 - torch.tensor(mean)) / torch.tensor(std)
        assert torch.allclose(view, expected.view(1, 3, 1, 1).expand_as(view), atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_decoding_on_cuda_agrees_with_the_cpu():
    images = [file_bytes(image, "JPEG", quality=92, progressive=i % 3 == 0) for i, image in enumerate(photos(32))]
    images[5] = file_bytes(photos(6)[5], "PNG")
    pipeline = build_pipeline("device", NEPATransform(64), "NEPA")
    samples = [(pipeline.view(pipeline.load(data), (7, 1, i)), 0, "x") for i, data in enumerate(images)]
    views, _, names = pipeline.collate(samples)
    expected, on_device = (pipeline.finish(views, torch.device(d), names)[0].cpu() for d in ("cpu", "cuda"))
    levels = (on_device - expected).abs() * 127.5
    assert levels.mean() < 1 and levels.max() < 24  # nvJPEG's transform and upsampling of colour are its own


# -- samples -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAST)
def test_a_sample_depends_on_seed_epoch_and_index_only(folder, name):
    images = LightlyDataset(str(folder))
    pipeline = build_pipeline(name, NEPATransform(24), "NEPA")

    def view(key, seed=3):
        part, label, filename = FileDataset(images, pipeline, seed, list(range(16)))[key]
        (result,) = pipeline.finish(pipeline.collate([(part, label, filename)])[0], CPU, [filename])
        return result[0], label, filename

    expected, label, filename = SeededDataset(images, NEPATransform(24), 3, list(range(16)))[2, 9]
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    ours = view((2, 9))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])
    assert ours[1:] == (label, filename) == (1, "b/009.jpg")
    assert (ours[0] - expected[0]).abs().max() * 127.5 <= 1.01
    torch.manual_seed(99)
    assert torch.equal(view((2, 9))[0], ours[0])
    for other in (view((3, 9)), view((2, 9), seed=4)):
        assert not torch.equal(other[0], ours[0])


@pytest.mark.parametrize("name", FAST)
def test_a_file_that_became_unreadable(tmp_path, name):
    root = photo_folder(tmp_path / "images", 4)
    dataset = FileDataset(LightlyDataset(str(root)), build_pipeline(name, NEPATransform(24), "NEPA"), 0, [0, 1, 2, 3])
    (root / "a" / "001.jpg").write_bytes(b"\xff\xd8 gone")
    with pytest.raises(DataError, match=r"a/001\.jpg cannot be read"):
        dataset[0, 1]
    (root / "a" / "001.jpg").unlink()
    with pytest.raises(DataError, match=r"a/001\.jpg cannot be read"):
        dataset[0, 1]
    dataset.on_bad_image = "skip"
    with pytest.warns(UserWarning, match=r"Skipped a/001\.jpg"):
        assert dataset[0, 1][2] == "b/002.jpg"


def test_pixels_that_turn_out_unreadable_on_the_device_are_named():
    data = file_bytes(photos(1)[0], "JPEG")
    pipeline = build_pipeline("device", NEPATransform(24), "NEPA")
    samples = [(pipeline.view(pipeline.load(d), (0, 0, 0)), 0, n) for d, n in ((data, "whole"), (data[:2000], "cut"))]
    views, _, names = pipeline.collate(samples)
    with pytest.raises(DataError, match="cut cannot be read: image file is truncated"):
        pipeline.finish(views, CPU, names)


# -- in Lightning ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    images = photo_folder(root / "images", 40)
    make_shards(images, root / "shards", images_per_shard=6)
    common = {"batch_size_per_device": 4, "seed": 5, "shuffle_buffer": 5}
    return {
        "folder": common | {"train_dir": str(images), "val_dir": str(images)},
        "shards": common | {"train_shards": str(root / "shards")},
    }


@pytest.mark.parametrize(
    ("source", "name", "workers"),
    [
        *(("folder", "tensor", 0), ("folder", "tensor", 2), ("folder", "device", 2)),
        *(("shards", "pil", 2), ("shards", "tensor", 0), ("shards", "device", 2)),
    ],
)
def test_resume_is_exact(sources, tmp_path, source, name, workers):
    """Stopped in the middle of the second of three epochs of ten batches: all that follows is bit for bit the same."""
    options = sources[source] | {"pipeline": name, "num_workers": workers, "val_dir": None}
    whole = record(options, epochs=3)
    first = record(options, epochs=3, callbacks=[LastCheckpoint(tmp_path, 13)], stop_after=15)
    rest = record(options, epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert len(whole.batches) == 30 and len(first.batches) == 15
    assert first.batches[:13] + rest.batches == whole.batches
    epochs = [sorted(name for batch in whole.batches[i : i + 10] for name in batch[0]) for i in (0, 10, 20)]
    assert epochs[0] == epochs[1] == epochs[2] and len(set(epochs[0])) == 40
    assert len({digest for _, _, digest in whole.batches}) == 30


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_method_gets_what_it_gets_from_pil(sources, precision):
    runs = {
        name: record(sources["folder"] | {"pipeline": name, "num_workers": 0}, epochs=1, precision=precision)
        for name in ("pil", *FAST)
    }
    pil = runs["pil"]
    rounding = 0.01 if precision == "bf16-true" else 0  # of values up to 1
    for name in FAST:
        assert [batch[:2] for batch in runs[name].batches] == [batch[:2] for batch in pil.batches]
        for view, expected in zip(runs[name].views, pil.views, strict=True):
            assert view.dtype == expected.dtype and view.shape == expected.shape == (4, 3, 24, 24)
            assert (view - expected).abs().max() <= 1.01 / 127.5 + rounding
        for image, expected in zip(runs[name].val_images, pil.val_images, strict=True):
            assert torch.equal(image, expected)  # validation is PIL's in any case
    assert len(pil.val_images) == 10


@pytest.mark.slow
@pytest.mark.parametrize(("source", "name"), [("folder", "tensor"), ("shards", "device")])
def test_two_ranks_see_different_images(sources, tmp_path, source, name):
    options = sources[source] | {"pipeline": name, "num_workers": 1}
    subprocess.run(
        [sys.executable, str(ROOT / "tests" / "recorder.py"), str(tmp_path), "2", "2", json.dumps(options)],
        check=True,
        timeout=300,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == 10
    for epoch in (slice(0, 5), slice(5, 10)):
        names = [name for rank in ranks for batch in rank[epoch] for name in batch[0]]
        assert len(names) == len(set(names)) == 40  # every image once, on one of the two


# -- the command -------------------------------------------------------------------------------------------------------


def command(run_dir, config, *args):
    small = ["--model.backbone_args.embed_dim", "32", "--model.backbone_args.depth", "2"]
    small += [
        "--trainer.max_epochs",
        "2",
        "--trainer.log_every_n_steps",
        "1",
        "--trainer.enable_model_summary",
        "false",
    ]
    small += ["--model.backbone_args.num_heads", "2"] if config == "nepa_demo" else []
    path = ROOT / "lightly_configs" / f"{config}.yaml"
    main(["--config", str(path), *small, "--run_dir", str(run_dir), *map(str, args)], path.with_name("base.yaml"))


def losses(run_dir):
    rows = (Path(run_dir) / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train_loss")
    return [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]


@pytest.mark.slow
def test_the_command_learns_with_each_pipeline(tmp_path):
    for name in ("pil", *FAST):
        command(tmp_path / name, "nepa_demo", "--data.pipeline", name)
    pil = losses(tmp_path / "pil")
    assert len(pil) == 20 and pil[-1] < pil[0] < 0
    for name in FAST:
        assert np.abs(np.array(losses(tmp_path / name)) - pil).max() < 2e-3


@pytest.mark.parametrize("name", FAST)
def test_a_method_with_another_augmentation_is_refused(tmp_path, capsys, name):
    with pytest.raises(SystemExit) as status:
        command(tmp_path / "run", "simclr_digits", "--data.pipeline", name)
    assert status.value.code == 2 and not (tmp_path / "run").exists()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"data.pipeline {name} is for methods" in line and "SimCLR does more. Use --data.pipeline pil." in line


def test_the_default_is_pil(folder):
    assert ImageData(train_dir=str(folder)).pipeline == "pil"


@pytest.mark.parametrize("name", ["pil", "tensor", "device"])
def test_masks_come_with_the_batch(folder, name):
    """A function of (seed, epoch) and of the first image: whatever process draws them, and in another batch others."""

    def loader(seed, workers, batches):
        inner = build_pipeline(name, NEPATransform(24), "NEPA")
        pipeline = MaskedPipeline(inner, lambda images: (torch.rand(images, 3), torch.randperm(images)))
        cls = PipelineDataset if name == "pil" else FileDataset
        dataset = cls(LightlyDataset(str(folder)), pipeline, seed, list(range(8)))
        keys = [[(epoch, i) for i in batch] for epoch, batch in batches]
        return pipeline, DataLoader(dataset, batch_sampler=keys, collate_fn=pipeline.collate, num_workers=workers)

    batches = [(0, [0, 1, 2, 3]), (0, [4, 5, 6, 7]), (1, [0, 1, 2, 3])]
    pipeline, plain = loader(7, 0, batches)
    drawn = []
    for views, labels, names, masks in plain:
        (view,) = pipeline.finish(views, CPU, names)
        assert view.shape == (4, 3, 24, 24) and len(labels) == len(names) == 4
        drawn.append(masks)
    assert [mask.shape for mask in drawn[0]] == [(4, 3), (4,)]
    assert not any(torch.equal(drawn[0][0], other[0]) for other in drawn[1:])
    _, resumed = loader(7, 2, batches[1:])
    for (*_, masks), expected in zip(resumed, drawn[1:], strict=True):
        assert all(torch.equal(mask, other) for mask, other in zip(masks, expected, strict=True))
    assert not torch.equal(next(iter(loader(8, 0, batches)[1]))[3][0], drawn[0][0])
