"""Top-k accuracy that counts every image once, over any number of devices, and none of a network that has diverged."""

from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy


class EvaluationDivergenceError(ValueError):
    """What an evaluation trains has left the finite numbers; the message says when and what to do."""


class FiniteTraining(Callback):
    """Ends a training whose weights are not finite; they are looked at once per epoch, and before they are scored.

    Args:
        option: The learning rate's, for the message.
    """

    def __init__(self, option: str) -> None:
        self.option = option

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the weights that are trained; they are the same in every process.

        Raises:
            EvaluationDivergenceError: If one is not finite.
        """
        trained = [parameter.detach() for parameter in pl_module.parameters() if parameter.requires_grad]
        if not torch.stack([weight.isfinite().all() for weight in trained]).all():
            raise diverged(f"after epoch {trainer.current_epoch + 1} of {trainer.max_epochs} a weight", self.option)

    on_validation_start = on_train_epoch_end


def diverged(what: str, option: str) -> EvaluationDivergenceError:
    """Return the error of a training whose weight or prediction is not finite."""
    return EvaluationDivergenceError(f"Training has diverged: {what} is not finite. Lower {option}.")


def accuracies(num_classes: int) -> nn.ModuleDict:
    """Return metrics ``top1`` and ``top5`` (or of all classes, where there are fewer); torchmetrics adds up counts.

    ``nonfinite`` counts the images whose logits are not finite.
    """
    ks = {1, min(5, num_classes)}
    metrics: dict[str, nn.Module] = {
        f"top{k}": MulticlassAccuracy(num_classes, top_k=k, average="micro") for k in sorted(ks)
    }
    return nn.ModuleDict(metrics | {"nonfinite": SumMetric()})


def score(module: LightningModule, metrics: nn.ModuleDict, logits: Tensor, targets: Tensor) -> None:
    """Count a batch of logits (B, C) and labels (B,), which may be empty, and log the accuracy of the epoch."""
    for name, metric in metrics.items():
        if not len(targets):
            pass
        elif name == "nonfinite":
            metric.update((~logits.isfinite().all(dim=1)).sum())  # type: ignore[operator]
        else:
            metric.update(logits, targets)  # type: ignore[operator]
        module.log(f"val_{name}", metric, on_step=False, on_epoch=True)  # type: ignore[arg-type]


def scores(trainer: Any, option: str) -> dict[str, float]:
    """Return what the last validation of a trainer logged, in per cent.

    Args:
        trainer: After training.
        option: The learning rate's, for the message.

    Raises:
        EvaluationDivergenceError: If the logits of an image are not finite.
    """
    values = dict(trainer.callback_metrics)
    if count := int(values["val_nonfinite"]):
        raise diverged(f"the prediction of {count} of the scored images", option)
    return {name.removeprefix("val_"): 100 * float(v) for name, v in values.items() if name.startswith("val_top")}
