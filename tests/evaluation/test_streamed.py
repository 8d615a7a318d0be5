import copy
import math
import shutil
from itertools import pairwise, product

import pytest
import timm
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nepa_plugin.data import digits_folder
from nepa_plugin.data.evaluation import ImageFormat
from nepa_plugin.evaluation import EvaluationOptions, LinearOptions, concat_depths, evaluate, extract_depth_features
from nepa_plugin.evaluation.images import open_images, ordered_loader
from nepa_plugin.evaluation.processes import Runtime, quiet
from nepa_plugin.evaluation.streamed import LR_FACTORS, DepthProbes, PooledDepths, _held_out, _spread

CPU = Runtime("cpu", 1, torch.device("cpu"))
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 0.5}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("three")
    for split, counts in (("train", (20, 20, 21)), ("val", (10, 10, 9))):
        for label, count in zip("035", counts, strict=True):
            (root / split / label).mkdir(parents=True)
            for file in sorted((digits_folder() / split / label).iterdir())[:count]:
                shutil.copy(file, root / split / label)
    return root


def _model(attention="causal"):
    torch.manual_seed(1)  # not what the floor is drawn with
    return timm.create_model("nepa_vit_tiny_patch14_224", attention=attention, **SIZES).eval()


def _options(solver, **kwargs):
    linear = LinearOptions(solver=solver, batch_size=16, readout_epochs=2)
    return EvaluationOptions(k=5, concat=2, batch_size=16, accelerator="cpu", cache=False, linear=linear, **kwargs)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_features_equal_those_that_are_kept(folder, attention):
    model = _model(attention)
    images = open_images(folder)
    loader = ordered_loader(images.val, ImageFormat.of(model).evaluation(), CPU, 64)
    kept = concat_depths(extract_depth_features(model, loader), k=3)
    pooled = PooledDepths(model, concat=3)
    pairs, beside = pooled(next(iter(loader))[0])
    assert pooled.depths == ["embedding", "block 1", "block 2", "final norm"]
    assert {pool for _, pool in pooled.pairs} == set(kept.features["embedding"]) - {"concat"}
    for (depth, pool), features in zip(pooled.pairs, pairs.unbind(1), strict=True):
        torch.testing.assert_close(features, kept.features[depth][pool])
    for i, (depth, features) in enumerate(zip(pooled.depths, beside.unbind(1), strict=True)):
        expected = kept.features[depth]["concat"]
        assert expected.shape[1] == 32 * min(i + 1, 3)
        torch.testing.assert_close(features[:, -expected.shape[1] :], expected)
        assert features[:, : -expected.shape[1]].abs().sum() == 0


class _Pixels(nn.Module):
    """Stands for a backbone: its one place is the image itself, and beside it the image twice."""

    pairs, depths, width, concat = [("pixels", "mean")], ["pixels"], 64, 2

    def forward(self, images):
        return images.unsqueeze(1), torch.cat([images, images], dim=1).unsqueeze(1)


def _digits():
    pixels, labels = load_digits(return_X_y=True)
    last = torch.arange(len(labels)) % 3 == 0
    pixels = torch.from_numpy(StandardScaler().fit(pixels[~last]).transform(pixels)).float()
    sets = [TensorDataset(pixels[part], torch.from_numpy(labels)[part]) for part in (~last, last)]
    return DataLoader(sets[0], batch_size=128, shuffle=True, drop_last=True), DataLoader(sets[1], batch_size=128)


def _train(epochs, loaders, **kwargs):
    probes = DepthProbes(_Pixels(), 128, 10, LinearOptions(readout_epochs=epochs, **kwargs))
    with quiet(0):
        trainer = CPU.trainer(epochs)
        trainer.fit(probes, *loaders)
    return probes, trainer


@pytest.mark.slow
def test_probes_agree_with_sklearn():
    train, val = _digits()
    fit, score = train.dataset.tensors, val.dataset.tensors
    expected = 100 * LogisticRegression(max_iter=2000).fit(*fit).score(*score)
    probes, _ = _train(60, (train, val))
    best = probes.best()
    assert list(best) == [("pixels", "mean"), ("pixels", "concat")]
    assert 95 < expected < 98
    assert best["pixels", "mean"] == pytest.approx(expected, abs=0.5)
    assert best["pixels", "concat"] == pytest.approx(expected, abs=0.7)


def test_each_probe_is_trained_as_if_alone():
    """Against SGD with momentum, a cosine and a BatchNorm, written out, per learning rate."""
    train, val = _digits()
    train = DataLoader(train.dataset, batch_size=128, drop_last=True)
    batches = 2 * list(train)
    probes, trainer = _train(2, (train, val), lr=0.4, momentum=0.8, weight_decay=0.01)
    assert [group["initial_lr"] for group in trainer.optimizers[0].param_groups] == pytest.approx(
        [0.2 * factor for factor in LR_FACTORS]
    )
    steps = len(batches)
    for i, factor in enumerate(LR_FACTORS):
        weight, bias = torch.zeros(64, 10), torch.zeros(10)
        speeds = [torch.zeros_like(weight), torch.zeros_like(bias)]
        norm, losses = nn.BatchNorm1d(64, affine=False), 0.0
        for step, (images, labels) in enumerate(batches):
            inputs = norm(images)
            logits = inputs @ weight + bias
            if step >= steps // 2:
                losses += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            error = (logits.softmax(1) - nn.functional.one_hot(labels, 10)) / len(labels)
            lr = 0.2 * factor * 0.5 * (1 + math.cos(math.pi * step / (steps - 1)))
            for value, speed, gradient in zip((weight, bias), speeds, (inputs.t() @ error, error.sum(0)), strict=True):
                speed.mul_(0.8).add_(gradient + 0.01 * value)
                value.sub_(lr * speed)
        torch.testing.assert_close(probes.single.weights[i][0], weight, atol=2e-5, rtol=1e-3)
        torch.testing.assert_close(probes.single.biases[i][0, 0], bias, atol=2e-5, rtol=1e-3)
        assert float(probes.losses.total[i, 0]) == pytest.approx(losses, rel=1e-4)


def test_the_lowest_training_loss_decides():
    probes = DepthProbes(_Pixels(), 4, 3, LinearOptions())
    for sums in (probes.hits, probes.scored, probes.losses):
        sums.update(torch.zeros(4, 2, 1))
    probes.hits.total[:] = torch.tensor([[1.0, 2.0], [2.0, 1.0], [3.0, 4.0], [4.0, 0.0]])
    probes.scored.total[:] = 4
    probes.losses.total[:] = torch.tensor([[5.0, 1.0], [3.0, float("nan")], [4.0, 9.0], [float("nan"), 8.0]])
    assert probes.best() == {("pixels", "mean"): 50.0, ("pixels", "concat"): 50.0}


@pytest.mark.slow
def test_neighbours_equal_those_of_kept_features(folder, tmp_path):
    model = _model()
    before = copy.deepcopy(model.state_dict())
    kept = evaluate(model, folder, ["readout"], _options("logistic", floor=True))["protocols"]["readout"]
    entry = evaluate(model, folder, ["readout"], _options("sgd", floor=True), tmp_path)["protocols"]["readout"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (kept["options"]["linear"]["solver"], entry["options"]["linear"]["solver"]) == ("logistic", "sgd")
    depths = ["embedding", "block 1", "block 2", "final norm"]
    places = list(product(depths, ["last", "mean", "concat"]))
    for rows in ("rows", "untrained_rows"):
        assert [(row["depth"], row["pool"]) for row in entry[rows]] == places
        for row, other in zip(entry[rows], kept[rows], strict=True):
            assert row["knn"] == pytest.approx(other["knn"], abs=1e-4)
            assert row["linear"] * 29 / 100 == pytest.approx(round(row["linear"] * 29 / 100), abs=1e-3)
            assert row["held_out"] * 12 / 100 == pytest.approx(round(row["held_out"] * 12 / 100), abs=1e-3)
    assert entry["rows"] != entry["untrained_rows"]
    assert (tmp_path / "readout.png").is_file() and (tmp_path / "results.json").is_file()


def test_what_chooses_the_depth_is_spread_over_the_training_images():
    mask = torch.arange(100) % 5 == 4
    assert _spread(mask, 50) == list(range(4, 100, 5))
    some = _spread(~mask, 8)
    assert len(some) == 8 and some[0] == 0 and some[-1] == 98 and not mask[some].any()
    assert max(b - a for a, b in pairwise(some)) <= 16


def test_few_images_of_a_class_choose_nothing(folder):
    images = open_images(folder)
    images.train.dataset.targets[:] = [0] * 58 + [1] * 3
    assert _held_out(_model(), images, ImageFormat.of(_model()), CPU, _options("sgd")) is None
