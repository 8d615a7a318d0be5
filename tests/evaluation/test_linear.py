import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_info, threadpool_limits
from torch.utils.data import DataLoader, TensorDataset

from nepa_plugin.evaluation import LinearOptions, linear, logistic_probe
from nepa_plugin.evaluation.linear import LinearProbe
from nepa_plugin.evaluation.processes import Runtime, quiet


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small are fastest so, by far where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_equals_hand_standardised_regression_on_digits():
    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = torch.from_numpy(pixels).float()[:800], torch.from_numpy(labels)[:800]
    train, val = pixels[:500], pixels[500:]
    deviation = train.std(0, correction=0)
    deviation[deviation == 0] = 1
    scaled_train, scaled_val = (train - train.mean(0)) / deviation, (val - train.mean(0)) / deviation
    reference = LogisticRegression(C=0.1, max_iter=2000).fit(scaled_train, labels[:500])
    expected = 100 * reference.score(scaled_val, labels[500:])
    actual = logistic_probe(train, labels[:500], val, labels[500:], C=0.1)
    assert 85 < actual < 100
    assert actual == pytest.approx(expected, abs=0.35)  # one of 300 images


def test_value():
    train = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]])
    val = torch.tensor([[-3.0], [3.0], [4.0], [5.0]])
    assert logistic_probe(train, torch.tensor([4, 4, 7, 7]), val, torch.tensor([4, 7, 4, 7])) == 75.0


def test_bad_input():
    features, labels = torch.randn(8, 3), torch.arange(8) % 2
    with pytest.raises(ValueError, match="one class"):
        logistic_probe(features, torch.zeros(8), features, labels)


@pytest.mark.slow
def test_sgd_agrees_with_sklearn_on_the_same_features():
    pixels, labels = load_digits(return_X_y=True)
    # interleaved, so that fit and score have the same writers and the two optima can be told apart from chance
    train, val = np.arange(len(labels)) % 3 != 0, np.arange(len(labels)) % 3 == 0
    scaled = StandardScaler().fit(pixels[train]).transform(pixels).astype("float32")
    expected = 100 * LogisticRegression(max_iter=2000).fit(scaled[train], labels[train]).score(scaled[val], labels[val])
    sets = [TensorDataset(torch.tensor(scaled[part]), torch.tensor(labels[part])) for part in (train, val)]
    options = LinearOptions(epochs=60)
    with quiet(0):
        probe = LinearProbe(torch.nn.Identity(), 128, scaled.shape[1], 10, options)
        trainer = Runtime("cpu", 1, torch.device("cpu")).trainer(options.epochs)
        loaders = DataLoader(sets[0], batch_size=128, shuffle=True, drop_last=True), DataLoader(sets[1], batch_size=128)
        trainer.fit(probe, *loaders)
    assert 95 < expected < 98
    assert 100 * float(trainer.callback_metrics["val_top1"]) == pytest.approx(expected, abs=0.5)


def test_options_of_sgd():
    probe = LinearProbe(
        torch.nn.Identity(), 64, 8, 3, LinearOptions(lr=0.4, momentum=0.5, weight_decay=0.01, batch_norm=True)
    )
    with quiet(0):
        trainer = Runtime("cpu", 1, torch.device("cpu")).trainer(1)
        data = DataLoader(TensorDataset(torch.randn(64, 8), torch.arange(64) % 3), batch_size=64)
        trainer.fit(probe, data)
    group = trainer.optimizers[0].param_groups[0]
    assert (group["initial_lr"], group["momentum"], group["weight_decay"]) == (pytest.approx(0.1), 0.5, 0.01)
    assert probe.classification_head[0].num_batches_tracked == 1
    assert [o.choose(n) for o, n in ((LinearOptions(), 50_000), (LinearOptions(), 50_001))] == ["logistic", "sgd"]


def test_small_logistic_regressions_have_one_blas_thread(monkeypatch):
    """Those of several libraries that spin beside each other wait for one another."""
    found = []
    fit = LogisticRegression.fit

    def watched(self, *args):
        pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
        found.append({pool["num_threads"] for pool in pools})
        return fit(self, *args)

    monkeypatch.setattr(LogisticRegression, "fit", watched)
    features, labels = torch.eye(4).repeat(5, 1), torch.arange(4).repeat(5)
    with threadpool_limits(2, user_api="blas"):
        assert logistic_probe(features, labels, features, labels) == 100.0
        monkeypatch.setattr(linear, "SMALL", 0)
        logistic_probe(features, labels, features, labels)
    assert found == [{1}, {2}]
