import gc

import pytest
import torch

from nepa_plugin.speed import Case, largest_batch, step_memory
from nepa_plugin.speed.memory import StepMemory

T, D = 17, 192


def memory(depth=2, **kwargs):
    dtype = kwargs.pop("dtype", torch.bfloat16)
    return step_memory(Case(model="tiny", img_size=56, depth=depth, **kwargs).method(), dtype, images=1)


def test_a_checkpointed_block_keeps_its_input():
    few, many = (memory(depth, grad_checkpointing=True).bytes_per_image for depth in (2, 5))
    assert many - few == 3 * T * D * 4


def test_what_a_block_keeps():
    """In float32, per token: the inputs of norms, linear layers and GELU, queries, keys, values and their output."""
    few, many = (memory(depth, dtype=torch.float32).bytes_per_image for depth in (2, 4))
    floats = (many - few) / 2 / (4 * T * D)
    # two norms: input and output 4; qkv 3, queries and keys after RoPE 2, attention 1, both LayerScales 2, MLP 4 + 4
    assert floats == pytest.approx(20, abs=1.5)
    assert memory(4).bytes_per_image < 0.8 * many


def test_state():
    method = Case(model="tiny", img_size=56, depth=2).method()
    parameters = sum(p.numel() for p in method.parameters())
    assert memory().state_bytes == 20 * parameters  # weight, gradient, two moments, average
    method.ema_decay = 0
    assert step_memory(method, images=1).state_bytes == 16 * parameters


def test_leaves_the_method_alone():
    method = Case(model="tiny", img_size=56, depth=2).method()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    state = torch.get_rng_state()
    assert step_memory(method, images=1) == step_memory(method, images=1)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module._forward_pre_hooks for module in method.modules())


def test_frees_what_it_counted():
    def held():
        for _ in range(3):  # what other tests left may take several passes, and must not go in between
            gc.collect()
        return sum(o.nbytes for o in gc.get_objects() if type(o) is torch.Tensor)

    method = Case(model="tiny", img_size=56, depth=2).method()
    step_memory(method, images=1)
    before = held()
    assert step_memory(method, images=4).bytes_per_image > 0
    assert held() == before


def test_largest_batch():
    assert largest_batch(StepMemory(100, 10), 1000, reserve=0.1) == 80
    assert StepMemory(100, 10).bytes(80) == 900
    assert largest_batch(StepMemory(2000, 10), 1000) == 0
