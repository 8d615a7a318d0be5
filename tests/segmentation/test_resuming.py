"""Which images a run sees, in which order and how augmented, from any step on."""

import itertools
import pickle

import numpy as np
import pytest

pytest.importorskip("mmseg")
from mmengine.dataset import InfiniteSampler, pseudo_collate, worker_init_fn
from mmengine.registry import DefaultScope
from torch.utils.data import DataLoader

from nepa_plugin.segmentation import ResumableSampler, SegmentationFolder
from nepa_plugin.segmentation.resuming import Draw

CLASSES = tuple("abcdefghijkl")


def take(sampler, number):
    return list(itertools.islice(iter(sampler), number))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (2, 3)])
def test_the_order_is_mmengines_from_any_draw_on(shuffle, rank, world_size, monkeypatch):
    monkeypatch.setattr("mmengine.dataset.sampler.get_dist_info", lambda: (rank, world_size))
    expected = take(InfiniteSampler(range(7), shuffle, seed=5), 40)
    sampler = ResumableSampler(range(7), shuffle, seed=5)
    whole = take(sampler, 40)
    assert whole == expected and take(sampler, 40) == expected
    sampler.start = 17
    rest = take(sampler, 23)
    assert rest == expected[17:] and [d.seed for d in rest] == [d.seed for d in whole[17:]]
    assert len({draw.seed for draw in whole}) == 40


def test_processes_draw_with_different_seeds(monkeypatch):
    seeds = []
    for rank in range(2):
        monkeypatch.setattr("mmengine.dataset.sampler.get_dist_info", lambda rank=rank: (rank, 2))
        seeds.append([draw.seed for draw in take(ResumableSampler(range(7), seed=5), 20)])
    assert len({*seeds[0], *seeds[1]}) == 40
    other = take(ResumableSampler(range(7), seed=6), 20)
    assert not {draw.seed for draw in other} & {*seeds[0], *seeds[1]}


def test_a_draw_reaches_the_loaders_processes_whole():
    draw = pickle.loads(pickle.dumps(Draw(3, 2**62)))
    assert draw == 3 and draw.seed == 2**62


def batches(scenes, workers, start, number):
    pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations"},
        {"type": "RandomResize", "scale": (64, 64), "ratio_range": (0.5, 2.0)},
        {"type": "RandomCrop", "crop_size": (24, 24)},
        {"type": "PhotoMetricDistortion"},
        {"type": "PackSegInputs"},
    ]
    folders = {"img_path": "images/training", "seg_map_path": "annotations/training"}
    with DefaultScope.overwrite_default_scope("mmseg"):
        dataset = SegmentationFolder(
            metainfo={"classes": CLASSES}, data_root=str(scenes), data_prefix=folders, pipeline=pipeline
        )
    sampler = ResumableSampler(dataset, seed=11)
    sampler.start = 2 * start
    loader = DataLoader(
        dataset,
        batch_size=2,
        sampler=sampler,
        num_workers=workers,
        collate_fn=pseudo_collate,
        worker_init_fn=lambda worker: worker_init_fn(worker, workers, 0, seed=99),
    )
    found = itertools.islice(loader, number)
    return [(image.numpy(), sample.img_path) for batch in found for image, sample in zip(*batch.values(), strict=True)]


def test_augmentation_depends_on_the_draw_alone(scenes):
    """Not on the number of loader processes, nor on where a run was resumed."""
    whole = batches(scenes, workers=0, start=0, number=5)
    for workers, start in ((2, 0), (0, 3), (2, 3)):
        part = batches(scenes, workers, start, 5 - start)
        assert [path for _, path in part] == [path for _, path in whole[2 * start :]]
        assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(part, whole[2 * start :], strict=True))
