"""k-nearest-neighbour accuracy of features, on any device and in chunks."""

from typing import Annotated

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from nepa_plugin.runtime.ranges import PositiveInt, Range, check_hints

#: Of kNN's votes. A neighbour's is exp(cosine / temperature), which float32 cannot hold below it.
Temperature = Annotated[float, Range(0.0125)]
#: Similarities that are computed at a time: 256 MB.
SIMILARITIES = 2**26


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
    device: str | torch.device = "cpu",
) -> float:
    """Return the top-1 accuracy of a weighted kNN classifier on cosine similarity.

    Each neighbour votes with exp(cosine / temperature). Source: Wu et al. 2018. Training features go to
    the device in chunks: it needs room for the validation features and some 0.6 GB, however many training images.

    Args:
        train_features: (N, D).
        train_labels: (N,).
        val_features: (M, D).
        val_labels: (M,).
        k: Number of neighbours.
        temperature: Of the votes.
        device: Where similarities are computed, in float32.

    Returns:
        Per cent.

    Raises:
        ValueError: If k is not from 1 to N, the temperature is too low, or the labels cannot be scored.
    """
    check_hints({"k": PositiveInt, "temperature": Temperature}, {"k": k, "temperature": temperature})
    if k > len(train_features):
        raise ValueError(f"k = {k} neighbours, but only {len(train_features)} training images.")
    num_classes = check_labels(train_labels, val_labels)
    queries = unit(val_features, device)
    nearest = NearestNeighbours(len(queries), k, device)
    rows = bank_rows(len(queries))
    for features, labels in zip(train_features.split(rows), train_labels.split(rows), strict=True):
        nearest.add(queries @ unit(features, device).t(), labels.to(device))
    hits = (nearest.predict(num_classes, temperature) == val_labels.to(device)).sum()
    return 100 * int(hits) / len(val_labels)


def bank_rows(queries: int) -> int:
    """Return how many training images are compared with so many queries at a time."""
    return max(256, SIMILARITIES // queries)


def unit(features: Tensor, device: str | torch.device) -> Tensor:
    """Return features (N, D) of length one on a device, in float32."""
    return normalize(features.to(device).float(), dim=1)


class NearestNeighbours:
    """The k nearest neighbours of queries among training images that come in parts, and their votes.

    lightly's ``knn_predict`` wants all training features at once, on one device; the predictions are the same.

    Args:
        count: Number of queries.
        k: Neighbours; there must be so many training images in all.
        device: Where similarities are.
    """

    def __init__(self, count: int, k: int, device: str | torch.device = "cpu") -> None:
        self.similarity = torch.full((count, k), -torch.inf, device=device)
        self.labels = torch.zeros((count, k), dtype=torch.long, device=device)

    def add(self, similarity: Tensor, labels: Tensor) -> None:
        """Take more training images into account.

        Args:
            similarity: Of every query to each of them, (queries, n).
            labels: Their classes (n,), or those of each query's (queries, n).
        """
        k = self.similarity.shape[1]
        top, at = similarity.topk(min(k, similarity.shape[1]), dim=1)
        classes = labels[at] if labels.ndim == 1 else labels.gather(1, at)
        self.similarity, kept = torch.cat([self.similarity, top], dim=1).topk(k, dim=1)
        self.labels = torch.cat([self.labels, classes], dim=1).gather(1, kept)

    def gather(self) -> "NearestNeighbours":
        """Return the neighbours of the same queries among the training images of all processes."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return self
        count, k = self.similarity.shape
        whole = NearestNeighbours(count, k, self.similarity.device)
        similarity, labels = (
            [torch.empty_like(mine) for _ in range(dist.get_world_size())] for mine in (self.similarity, self.labels)
        )
        dist.all_gather(similarity, self.similarity)
        dist.all_gather(labels, self.labels)
        whole.add(torch.cat(similarity, dim=1), torch.cat(labels, dim=1))
        return whole

    def predict(self, num_classes: int, temperature: float) -> Tensor:
        """Return the class (queries,) with the most votes."""
        predictions = []
        for similarity, labels in zip(self.similarity.split(1024), self.labels.split(1024), strict=True):
            votes = similarity.new_zeros(len(labels), num_classes)
            predictions.append(votes.scatter_add_(1, labels, (similarity / temperature).exp()).argmax(dim=1))
        return torch.cat(predictions)
