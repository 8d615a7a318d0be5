"""bfloat16 on the device, float32 on the CPU, and no loss scaler that leaves out steps."""

import pytest
import torch

pytest.importorskip("mmseg")
from mmengine.optim import build_optim_wrapper
from torch import nn

from nepa_plugin.segmentation import BFloat16OptimWrapper


def wrapper_of(model, **kwargs):
    optimizer = {"type": "SGD", "lr": 0.5}
    return build_optim_wrapper(model, {"type": "BFloat16OptimWrapper", "optimizer": optimizer, **kwargs})


def step(wrapper, model, images):
    with wrapper.optim_context(model):
        output = model(images)
        loss = (output.float() ** 2).mean()
    wrapper.update_params(loss)
    return output


def test_float32_on_the_cpu():
    model = nn.Linear(3, 2)
    assert step(wrapper_of(model), model, torch.ones(4, 3)).dtype == torch.float32


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_in_bfloat16(device, monkeypatch):
    """Of weights that stay in float32, by the gradient of the bfloat16 forward pass."""
    monkeypatch.setattr(BFloat16OptimWrapper, "DEVICES", frozenset({device}))
    torch.manual_seed(0)
    model, images = nn.Linear(3, 2, device=device), torch.randn(4, 3, device=device)
    before = model.weight.detach().clone()
    output = step(wrapper_of(model), model, images)
    assert output.dtype == torch.bfloat16 and model.weight.dtype == torch.float32
    rounded = (output.detach().float() * 2 / output.numel()).T @ images
    torch.testing.assert_close(model.weight, before - 0.5 * rounded, rtol=0.02, atol=2e-3)


def test_gradients_are_accumulated_and_clipped():
    torch.manual_seed(0)
    model, images = nn.Linear(3, 2), torch.randn(4, 3)
    before = model.weight.detach().clone()
    wrapper = wrapper_of(model, accumulative_counts=2, clip_grad={"max_norm": 0.01})
    wrapper.initialize_count_status(model, 0, 2)
    step(wrapper, model, images)
    assert torch.equal(model.weight, before)
    step(wrapper, model, images)
    moved = torch.cat([(model.weight - before).flatten(), torch.zeros(0)]).norm()
    assert 0 < moved <= 0.5 * 0.01 * 1.0001


def test_no_step_is_left_out_in_silence():
    """A gradient that is not finite reaches the weights, where the divergence hook finds it."""
    model = nn.Linear(3, 2)
    step(wrapper_of(model), model, torch.full((4, 3), torch.inf))
    assert not model.weight.isfinite().any()


def test_the_state_of_a_loss_scaler_is_passed_over():
    model = nn.Linear(3, 2)
    wrapper = wrapper_of(model)
    state = wrapper.state_dict()
    assert "loss_scaler" not in state
    wrapper.load_state_dict(state | {"loss_scaler": {"scale": 1.0}})
