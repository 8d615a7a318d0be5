import numpy as np
import pytest
import torch
from lightly.utils.benchmarking.knn import knn_predict
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.functional import normalize

from nepa_plugin.evaluation import knn, knn_accuracy
from nepa_plugin.evaluation.knn import NearestNeighbours, bank_rows


def _digits():
    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = torch.from_numpy(pixels).float(), torch.from_numpy(labels)
    return pixels[:1000], labels[:1000], pixels[1000:], labels[1000:]


@pytest.mark.parametrize("temperature", [0.1, 0.05])
def test_agrees_with_sklearn_on_digits(temperature):
    train, train_labels, val, val_labels = _digits()
    reference = KNeighborsClassifier(
        20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(train, train_labels)
    expected = 100 * reference.score(val, val_labels)
    actual = knn_accuracy(train, train_labels, val, val_labels, k=20, temperature=temperature)
    assert 90 < actual < 100
    assert actual == pytest.approx(expected, abs=0.5)


def test_scale_does_not_matter():
    train, train_labels, val, val_labels = _digits()
    expected = knn_accuracy(train, train_labels, val, val_labels)
    assert knn_accuracy(7 * train, train_labels, 0.5 * val, val_labels) == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize("rows", [7, 256, 999])
def test_in_chunks_equals_lightly_at_once(monkeypatch, rows):
    train, train_labels, val, val_labels = _digits()
    bank, queries = normalize(train, dim=1), normalize(val, dim=1)
    expected = knn_predict(queries, bank.t().contiguous(), train_labels, 10, knn_k=20, knn_t=0.1)[:, 0]
    nearest = NearestNeighbours(len(queries), 20)
    for part, labels in zip(bank.split(rows), train_labels.split(rows), strict=True):
        nearest.add(queries @ part.t(), labels)
    assert torch.equal(nearest.predict(10, 0.1), expected)

    monkeypatch.setattr(knn, "bank_rows", lambda queries: rows)
    hits = int((expected == val_labels).sum())
    assert knn_accuracy(train, train_labels, val, val_labels) == 100 * hits / len(val_labels)
    assert (knn.bank_rows(50_000), bank_rows(50_000), bank_rows(10**6)) == (rows, 1342, 256)


def test_value():
    train = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    val = torch.tensor([[2.0, 0.1], [0.1, 3.0], [5.0, 0.2], [1.0, 0.0]])
    assert knn_accuracy(train, torch.tensor([1, 1, 3, 3]), val, torch.tensor([1, 3, 3, 1]), k=2) == 75.0


def test_bad_input():
    features, labels = torch.randn(8, 3), torch.arange(8) % 2
    with pytest.raises(ValueError, match="k = 20 neighbours, but only 8"):
        knn_accuracy(features, labels, features, labels)
    with pytest.raises(ValueError, match="one class"):
        knn_accuracy(features, torch.zeros(8, dtype=torch.long), features, labels, k=2)
    with pytest.raises(ValueError, match=r"training has not: \[5\]"):
        knn_accuracy(features, labels, features, torch.full((8,), 5), k=2)
