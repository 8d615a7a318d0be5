"""A module for Lightning that trains nothing and writes down what the data module gives it.

python tests/recorder.py OUT DEVICES EPOCHS OPTIONS_AS_JSON
"""

import hashlib
import json
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from pytorch_lightning import LightningModule, Trainer

from nepa_plugin.data import ImageData, NEPATransform, eval_transform


class Stopped(Exception):
    """The run is over, as if by SIGKILL."""


class Recorder(LightningModule):
    """Keeps (filenames, labels, hash of the views) of each training batch, and the validation images."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.transform = NEPATransform(24)
        self.batches, self.views, self.val_images = [], [], []
        self.stop_after = None

    def train_transform(self):
        return self.transform

    def eval_transform(self, crop_pct):
        return eval_transform(24, crop_pct)

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == self.stop_after:
            raise Stopped

    def training_step(self, batch, batch_idx):
        (view,), labels, filenames = batch
        self.views.append(view)
        digest = hashlib.sha256(view.float().numpy().tobytes()).hexdigest()
        self.batches.append((list(filenames), labels.tolist(), digest))
        return self.weight * view.float().mean()

    def validation_step(self, batch, batch_idx):
        self.val_images.append(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(epochs=2, devices=1, **kwargs):
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=devices,
        use_distributed_sampler=False,
        enable_checkpointing="callbacks" in kwargs,
        num_sanity_val_steps=0,
        **({"strategy": "ddp"} if devices > 1 else {}),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


def record(options, epochs=2, devices=1, ckpt_path=None, stop_after=None, **kwargs):
    """Return the recorder of a run, which ends with step ``stop_after`` if that is given."""
    module, runner = Recorder(), trainer(epochs, devices, **kwargs)
    module.stop_after = stop_after
    with suppress(Stopped):
        runner.fit(module, datamodule=ImageData(**options), ckpt_path=ckpt_path, weights_only=True)
    return module


if __name__ == "__main__":
    recorded = record(json.loads(sys.argv[4]), int(sys.argv[3]), int(sys.argv[2]))
    (Path(sys.argv[1]) / f"{recorded.global_rank}.json").write_text(json.dumps(recorded.batches))
