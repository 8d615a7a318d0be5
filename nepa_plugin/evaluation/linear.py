"""Linear probe of cached features."""

import warnings

from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from nepa_plugin.evaluation.knn import check_labels


def logistic_probe(
    train_features: Tensor, train_labels: Tensor, val_features: Tensor, val_labels: Tensor, C: float = 1.0
) -> float:
    """Return the top-1 accuracy of scikit-learn's logistic regression on standardised features.

    Args:
        train_features: (N, D).
        train_labels: (N,).
        val_features: (M, D).
        val_labels: (M,).
        C: Inverse strength of the L2 penalty.

    Returns:
        Per cent.

    Raises:
        ValueError: If the labels cannot be scored.
    """
    check_labels(train_labels, val_labels)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000))
    with warnings.catch_warnings():
        # features of an untrained network are nearly collinear; the accuracy has settled long before the weights
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(train_features.numpy(), train_labels.numpy())
    return 100 * float(probe.score(val_features.numpy(), val_labels.numpy()))
