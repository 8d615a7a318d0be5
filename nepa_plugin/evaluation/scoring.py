"""Top-k accuracy that counts every image once, over any number of devices."""

from typing import Any

from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy


def accuracies(num_classes: int) -> nn.ModuleDict:
    """Return metrics ``top1`` and ``top5`` (or of all classes, where there are fewer); torchmetrics adds up counts."""
    ks = {1, min(5, num_classes)}
    return nn.ModuleDict({f"top{k}": MulticlassAccuracy(num_classes, top_k=k, average="micro") for k in ks})


def score(module: LightningModule, metrics: nn.ModuleDict, logits: Tensor, targets: Tensor) -> None:
    """Count a batch of logits (B, C) and labels (B,), and log the accuracy of the epoch."""
    for name, metric in metrics.items():
        metric.update(logits, targets)  # type: ignore[operator]
        module.log(f"val_{name}", metric, on_step=False, on_epoch=True)  # type: ignore[arg-type]


def scores(trainer: Any) -> dict[str, float]:
    """Return what the last validation of a trainer logged, in per cent."""
    values = trainer.callback_metrics.items()
    return {name.removeprefix("val_"): 100 * float(value) for name, value in values if name.startswith("val_top")}
