"""k-nearest-neighbour accuracy of features, with lightly's classifier."""

from typing import Annotated

import torch
from lightly.utils.benchmarking.knn import knn_predict
from torch import Tensor
from torch.nn.functional import normalize

from nepa_plugin.runtime.ranges import PositiveInt, Range, check_hints

#: Of kNN's votes. A neighbour's is exp(cosine / temperature), which float32 cannot hold below it.
Temperature = Annotated[float, Range(0.0125)]


def check_labels(train_labels: Tensor, val_labels: Tensor) -> int:
    """Return the number of classes, or say why these labels cannot be scored.

    Raises:
        ValueError: If there is one class only, or validation has classes that training has not.
    """
    classes = set(train_labels.tolist())
    if len(classes) < 2:
        raise ValueError("All training images have one class: give a folder with one sub-folder per class.")
    unknown = set(val_labels.tolist()) - classes
    if unknown:
        raise ValueError(f"Validation has classes that training has not: {sorted(unknown)}.")
    return max(classes) + 1


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    k: int = 20,
    temperature: float = 0.1,
) -> float:
    """Return the top-1 accuracy of a weighted kNN classifier on cosine similarity.

    Each neighbour votes with exp(cosine / temperature). Source: Wu et al. 2018, as lightly implements it.

    Args:
        train_features: (N, D).
        train_labels: (N,).
        val_features: (M, D).
        val_labels: (M,).
        k: Number of neighbours.
        temperature: Of the votes.

    Returns:
        Per cent.

    Raises:
        ValueError: If k is not from 1 to N, the temperature is too low, or the labels cannot be scored.
    """
    check_hints({"k": PositiveInt, "temperature": Temperature}, {"k": k, "temperature": temperature})
    if k > len(train_features):
        raise ValueError(f"k = {k} neighbours, but only {len(train_features)} training images.")
    num_classes = check_labels(train_labels, val_labels)
    bank = normalize(train_features.float(), dim=1).t().contiguous()
    correct = 0
    for features, labels in zip(val_features.split(1024), val_labels.split(1024), strict=True):
        ranking = knn_predict(
            normalize(features.float(), dim=1), bank, train_labels, num_classes, knn_k=k, knn_t=temperature
        )
        correct += int(torch.sum(ranking[:, 0] == labels))
    return 100 * correct / len(val_labels)
