import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from nepa_plugin.evaluation import logistic_probe


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
