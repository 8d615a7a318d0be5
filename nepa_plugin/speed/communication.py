"""How much the processes of a run send each other in one optimizer step, counted."""

import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback
from torch.profiler import ProfilerActivity, profile

#: Bytes per element by the profiler's name of the type.
ITEM_SIZES = {
    **{"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "bool": 1},
    **{"long": 8, "long int": 8, "int": 4, "short": 2, "unsigned char": 1, "signed char": 1},
}


def collectives(trace: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Count the collective operations in a profile.

    Args:
        trace: A Chrome trace of ``torch.profiler`` with shapes.

    Returns:
        Operation and type of its elements (``"all_reduce float"``) -> ``{"calls": ..., "bytes": ...}``, the bytes those
        of the tensors that this process hands to it. What then goes over the wire depends on the algorithm: a ring
        all-reduce of n processes sends 2 (n - 1) / n of it.

    Raises:
        ValueError: If a tensor has an unknown type.
    """
    counts: dict[str, dict[str, int]] = {}
    for event in trace["traceEvents"]:
        operation = re.fullmatch(r"(?:gloo|nccl):(\w+)", str(event.get("name")))
        shapes = event.get("args", {}).get("Input Dims")
        if operation is None or shapes is None:  # on a GPU the kernel is a second event, without shapes
            continue
        for shape, kind in zip(shapes, event["args"]["Input type"], strict=True):
            if kind not in ITEM_SIZES:
                raise ValueError(f"{event['name']}: unknown type {kind!r}, its size must be added to ITEM_SIZES.")
            count = counts.setdefault(f"{operation[1]} {kind}", {"calls": 0, "bytes": 0})
            count["calls"] += 1
            count["bytes"] += ITEM_SIZES[kind] * math.prod(shape)
    return counts


class CommunicationCount(Callback):
    """Count all that one process sends in one optimizer step, and write ``communication.json`` in the run folder.

    The step runs from the end of the one before to its own end, with everything that Lightning does between. Steps that
    log or save a checkpoint send more; take another. Use: ``--trainer.callbacks
    nepa_plugin.speed.communication.CommunicationCount``.

    Args:
        step: The optimizer step to count, from 1; the first ones still set up.
    """

    def __init__(self, step: int = 5) -> None:
        if step < 1:
            raise ValueError(f"CommunicationCount(step={step}): the first step that can be counted is 1.")
        self.step = step
        self.counts: dict[str, dict[str, int]] | None = None
        self._profile: profile | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start the profile where the step before has ended, and stop it at the step's end."""
        if self._profile is None and self.counts is None and trainer.global_step == self.step:
            self._profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
            self._profile.start()
        elif self._profile is not None and trainer.global_step > self.step:
            self._profile.stop()
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trace.json"
                self._profile.export_chrome_trace(str(path))
                self.counts = collectives(json.loads(path.read_text()))
            self._profile = None
            if trainer.is_global_zero:
                (Path(trainer.default_root_dir) / "communication.json").write_text(json.dumps(self.counts, indent=2))
