"""The trainers of an evaluation."""

import pytest
import torch

from nepa_plugin.evaluation import processes
from nepa_plugin.evaluation.processes import Runtime


@pytest.mark.parametrize(
    ("accelerator", "world_size", "expected"), [("cuda", 2, True), ("cuda", 1, False), ("cpu", 2, False)]
)
def test_batch_norm_sees_the_batch_of_all_devices(accelerator, world_size, expected, monkeypatch):
    """Where PyTorch can: it has no synchronised BatchNorm for the CPU."""
    monkeypatch.setattr(processes, "Trainer", lambda **kwargs: kwargs)
    runtime = Runtime(accelerator, world_size, torch.device(accelerator), world_size=world_size)
    assert runtime.trainer(3)["sync_batchnorm"] is expected
