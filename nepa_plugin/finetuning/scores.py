"""What the validations of a fine-tuning have found, and the weights of the best of them."""

from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from nepa_plugin.methods.optimization import DivergenceError


class Scores(Callback):
    """Keeps the accuracies of the last and the best validation, over restarts too.

    It has to come before the callback that averages the weights, which takes the average out again after a validation.

    Args:
        keep_best: Keep the network with the highest accuracy, as it was scored.

    Attributes:
        last: ``epoch`` (from 1) and ``top1`` and ``top5`` in per cent (or of all classes, where there are fewer).
        best: The same of the epoch with the highest ``top1``, the first of several.
        best_state: With ``keep_best``, the network's weights then, on the CPU.
    """

    def __init__(self, keep_best: bool = False) -> None:
        self.keep_best = keep_best
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.best_state: dict[str, Tensor] = {}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Read the accuracies, which are those over all processes.

        Raises:
            DivergenceError: If a prediction is not finite.
        """
        if trainer.sanity_checking:
            return
        found = {name: float(metric.compute()) for name, metric in pl_module.accuracy.items()}
        if count := int(found.pop("nonfinite")):
            raise DivergenceError(
                f"the prediction of {count} of the scored images is not finite after step {trainer.global_step}",
                f"Lower {pl_module.rate} (now {getattr(pl_module, pl_module.rate):g}) and go on with --ckpt_path last.",
            )
        self.last = {"epoch": trainer.current_epoch + 1} | {name: 100 * value for name, value in found.items()}
        if self.last["top1"] > self.best.get("top1", -1.0):
            self.best = dict(self.last)
            if self.keep_best:
                state = pl_module.network.state_dict()
                self.best_state = {name: value.detach().cpu().clone() for name, value in state.items()}

    def final(self) -> dict[str, float]:
        """Return what the run is said to reach, in per cent; nothing where nothing was validated.

        ``top1`` and ``top5`` of the last validation, or with ``keep_best`` ``top1`` and ``best_epoch`` of the best one,
        and ``last_top1``.
        """
        last = {name: value for name, value in self.last.items() if name != "epoch"}
        if not self.keep_best or not last:
            return last
        return {"top1": self.best["top1"], "best_epoch": int(self.best["epoch"]), "last_top1": last["top1"]}

    def state_dict(self) -> dict[str, Any]:
        """Return all that was found, for the checkpoint."""
        return {"last": self.last, "best": self.best, "best_state": self.best_state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it from a checkpoint."""
        self.last, self.best = state_dict["last"], state_dict["best"]
        self.best_state = state_dict["best_state"] if self.keep_best else {}
        if self.keep_best and self.best and not self.best_state:
            self.best = {}  # the run did not keep the best so far: the best from now on counts
