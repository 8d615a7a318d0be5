"""How often a training step makes the host wait for the device: by the conversions of tensors to numbers."""

import json
import traceback
from collections import Counter

import pytest
import torch
from pretraining import run
from torch.utils._python_dispatch import TorchDispatchMode

#: Conversions of what is on the CPU anyway: augmentation, AdamW's counter of steps (fused on CUDA), RoPE's factor.
ON_THE_CPU = "torchvision/", "torch/optim/", "torch/utils/data/", "pytorch_lightning/utilities/data.py", "predictor.py"


class Conversions(TorchDispatchMode):
    """Counts ``.item()``, ``float()`` and ``bool()`` in training, by the step at which they happen."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            frames = [frame for frame, _ in traceback.walk_stack(None)]
            files = [frame.f_code.co_filename for frame in frames]
            loops = [frame for frame, file in zip(frames, files, strict=True) if "training_epoch_loop.py" in file]
            validating = any("evaluation_loop.py" in file for file in files)
            if loops and not validating and not any(place in file for file in files for place in ON_THE_CPU):
                loop = next(frame for frame in loops if frame.f_code.co_name == "advance")
                self.count[loop.f_locals["self"].trainer.global_step] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_that_does_not_log_converts_nothing(tmp_path):
    with Conversions() as conversions:
        run("--run_dir", tmp_path / "r", "--trainer.log_every_n_steps", 5)
    # global_step counts on within a step, before what was logged is written
    assert conversions.count and set(conversions.count) <= {4, 5, 9, 10, 14, 15, 19, 20}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_says_the_same(tmp_path):
    """Nothing between two steps of a real run waits for the device: not the loop, the transfer nor the optimizer."""
    callback = {"class_path": "recording.NoWaits", "init_args": {"first": 3, "last": 9}}
    more = "--trainer.accelerator", "cuda", "--trainer.devices", "1", "--trainer.log_every_n_steps", "50"
    run("--run_dir", tmp_path / "r", *more, "--trainer.callbacks", json.dumps([callback]), "--trainer.max_epochs", "3")
