"""Accuracy of a classifier as it is: nothing is trained."""

from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import nn

from nepa_plugin.checkpoints import class_names
from nepa_plugin.data.evaluation import ImageFormat
from nepa_plugin.evaluation.features import frozen
from nepa_plugin.evaluation.images import Images, ordered_loader
from nepa_plugin.evaluation.processes import Runtime, quiet
from nepa_plugin.runtime.scoring import accuracies, score, scores


class _Classifier(LightningModule):
    def __init__(self, network: nn.Module, order: list[int]) -> None:
        super().__init__()
        self.network = network
        self.accuracy = accuracies(len(order))
        self.register_buffer("order", torch.tensor(order))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        order: Any = self.order
        score(self, self.accuracy, self.network(batch[0])[:, order], batch[1])


def check_head(model: Any, images: Images) -> list[int]:
    """Return which logit is that of each class of the images.

    Where the network's class names are the folders', they say so; where they are others, as ImageNet's words and its
    folders, both are taken to be in one order.

    Raises:
        ValueError: If the network is no classifier of so many classes, or its names are the folders' in part.
    """
    num_classes = getattr(model, "num_classes", 0)
    if num_classes != len(images.classes):
        what = f"{num_classes} classes" if num_classes else "no head"
        raise ValueError(f"protocol head: the network has {what}, {images.source} has {len(images.classes)} classes.")
    names = class_names(model) or []
    if set(names) == set(images.classes):
        return [names.index(name) for name in images.classes]
    if common := set(names) & set(images.classes):
        other = sorted(set(images.classes) - set(names))[0]
        raise ValueError(
            f"protocol head: the network knows {len(common)} of the {num_classes} classes of {images.source} by name, "
            f"and not {other!r}, for one. Rename the folders as its classes."
        )
    return list(range(num_classes))


def head_accuracy(
    model: Any,
    images: Images,
    form: ImageFormat,
    runtime: Runtime,
    batch_size: int = 256,
    num_workers: int | None = None,
) -> dict[str, float]:
    """Score a classifier's own head on every validation image once, on all devices.

    Args:
        model: The classifier; it is left as it is.
        images: Whose validation images are scored.
        form: How the model takes images.
        runtime: Devices.
        batch_size: Images per device.
        num_workers: Loader processes per device.

    Returns:
        ``top1`` and ``top5`` (or of all classes, where there are fewer) in per cent.

    Raises:
        ValueError: As :func:`check_head`, or if a prediction is not finite.
    """
    order = check_head(model, images)
    with quiet(0), frozen(model):
        trainer = runtime.trainer(1)
        val = ordered_loader(images.val, form.evaluation(), runtime, batch_size, num_workers)
        trainer.validate(_Classifier(model, order), val, verbose=False)
        return scores(trainer, "the learning rate that it was trained with")
