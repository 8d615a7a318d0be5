"""A step of every method on a stand-in for a CUDA device, where all that the host would have to wait for is an error.

FakeTensors have a device and a shape but no values, so that an ``.item()``, an index by a mask and a ``nonzero`` fail.
Copies from memory that is not pinned are counted: CUDA makes the host wait for these, too. torch's engine for backward
passes asks a CUDA device for its context, so the step with a backward pass is on a stand-in for the CPU, where all the
former fails as well.
"""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from every_method import CONFIGS, METHODS
from pytorch_lightning.callbacks import WeightAveraging
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nepa_plugin import methods
from nepa_plugin.methods.multi_crop import MultiCrop
from nepa_plugin.training.configs import read_config

BATCH = 8


class BlockingCopies(TorchDispatchMode):
    """Counts copies between CPU and CUDA that are not ``non_blocking``; a list of numbers on CUDA is one, too."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            devices = {tensor.device.type for tensor in (*args[:2], result) if isinstance(tensor, torch.Tensor)}
            if devices == {"cpu", "cuda"} and not kwargs.get("non_blocking", len(args) > 2 and args[2]):
                self.count[name] += 1
        return result


def test_the_stand_in_finds_what_waits():
    with FakeTensorMode(), BlockingCopies() as copies:
        values = torch.ones(4, device="cuda")
        for wait in (lambda: values.sum().item(), lambda: values[values > 0], lambda: values.nonzero()):
            with pytest.raises(Exception, match=r"aten._local_scalar_dense|aten.nonzero|aten.index"):
                wait()
        torch.ones(4).to("cuda", non_blocking=True)
        values + 1.5
        values / torch.tensor(0.1)  # a number to CUDA, too
        assert not copies.count
        torch.ones(4).to("cuda")
        torch.tensor([1.0, 2.0], device="cuda")
        values.copy_(torch.ones(4))
        values.cpu()
    assert copies.count == {"_to_copy": 3, "copy_": 1}


def built(name):
    model = read_config(CONFIGS / f"{name}_digits.yaml")["model"]
    cls = getattr(methods, model["class_path"].rsplit(".", 1)[1])
    torch.manual_seed(0)
    return cls(batch_size_per_device=BATCH, num_classes=10, **(model["init_args"] | {"drop_path_rate": 0.1}))


def on_stand_in(method, device, mode):
    """Give a method parameters and buffers that are FakeTensors."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        method._apply(lambda tensor: mode.from_tensor(tensor.detach()).to(device))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    method._device = torch.device(device)  # Lightning's record of it


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_waits_for_nothing(name, device):
    """Forward and backward pass, clipping, the optimizer's step, the momentum encoder's and the moving average's."""
    method = built(name).train()
    size = method.img_size
    sizes = [size] * {"nepa": 1, "mae": 1, "ijepa": 1, "aim": 1, "beit": 1, "igpt": 1, "cpc": 1}.get(name, 2)
    if isinstance(method, MultiCrop):
        sizes += [method.local_crop_size] * method.num_local_crops
    masks = [] if method.masks is None else [method.masks(BATCH)]
    method._trainer = SimpleNamespace(
        world_size=1,
        accumulate_grad_batches=1,
        estimated_stepping_batches=100,
        global_step=0,
        log_every_n_steps=50,
        current_epoch=0,
        precision="bf16-mixed",
        strategy=None,
    )
    method.log = method.log_dict = lambda *args, **kwargs: None
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        on_stand_in(method, device, mode)
        (optimizer,), _ = method.configure_optimizers()
        averaging = [c for c in method.configure_callbacks() if isinstance(c, WeightAveraging)]
        for callback in averaging:
            callback.setup(method._trainer, method, "fit")
        views = [torch.ones(BATCH, 3, size, size, device=device) for size in sizes]
        masks = [[part.to(device) for part in drawn] for drawn in masks]
        batch = views, torch.zeros(BATCH, dtype=torch.long, device=device), [], *masks
        with BlockingCopies() as copies:
            with torch.autocast(method.device.type, torch.bfloat16):
                loss = method.training_step(batch, 0)

            def closure():
                optimizer.zero_grad()
                if device == "cpu":
                    loss.backward()
                for parameter in method.parameters():
                    if parameter.requires_grad and parameter.grad is None:
                        parameter.grad = torch.ones_like(parameter)
                method.on_before_optimizer_step(optimizer)
                method.configure_gradient_clipping(optimizer)

            optimizer.step = wrapped(optimizer.step)
            method.optimizer_step(0, 0, optimizer, closure)
            for callback in averaging:
                callback.on_train_batch_end(method._trainer, method, None, batch, 0)
    assert not copies.count


def wrapped(step):
    """Return the optimizer's step as Lightning's has it: the closure first."""

    def stepped(closure):
        closure()
        step()

    return stepped
