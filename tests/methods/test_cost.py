import pytest
import torch

from nepa_plugin.methods import NEPA, cost
from nepa_plugin.methods.cost import training_cost

D, DEPTH, T, PATCH = 32, 2, 17, 4 * 4 * 3


@pytest.fixture(params=["computed", "valueless"])
def method(request, monkeypatch):
    """A small one, which is counted as it is and as a large one would be."""
    if request.param == "valueless":
        monkeypatch.setattr(cost, "SMALL", 0)
    torch.manual_seed(0)
    size = {"embed_dim": D, "depth": DEPTH, "num_heads": 2}
    return NEPA(8, 3, backbone="nepa_vit_tiny_patch14_224", img_size=16, patch_size=4, backbone_args=size)


def test_equals_the_formula_of_a_transformer(method):
    """Per token and block 12 D^2 weights, and two T x T products per head; backward is twice forward."""
    blocks = DEPTH * (T * 2 * 12 * D * D + 2 * 2 * T * T * D)
    embedding = (T - 1) * 2 * PATCH * D
    counted = training_cost(method)
    # nothing needs the gradient of the pixels, so the patch embedding's backward pass is one product, not two
    assert counted.gflops * 1e9 == pytest.approx(3 * blocks + 2 * embedding, rel=1e-6)
    assert (counted.views, counted.encoder_passes, counted.encoder_tokens) == (1, 1, T)
    assert counted.backbone_parameters == sum(p.numel() for p in method.backbone.parameters())
    assert counted.discarded_parameters == 0  # NEPA has no head; the probe does not count


def test_does_not_depend_on_the_batch(method):
    one, two = training_cost(method, 2), training_cost(method, 6)
    assert one.gflops == pytest.approx(two.gflops, rel=1e-6) and one.encoder_passes == two.encoder_passes


def test_leaves_the_method_and_the_generators_alone(method):
    before = {name: value.clone() for name, value in method.state_dict().items()}
    state = torch.get_rng_state()
    training_cost(method)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert all(p.grad is None for p in method.parameters())
    assert not method.backbone.blocks[0]._forward_pre_hooks


def test_a_small_network_on_large_images_is_not_computed():
    """Its attention's tables would fill the memory: 65,537 tokens squared, for every head and image."""
    size = {"embed_dim": D, "depth": 1, "num_heads": 2}
    large = NEPA(8, 3, backbone="nepa_vit_tiny_patch14_224", img_size=1024, patch_size=4, backbone_args=size)
    assert training_cost(large).encoder_tokens == 256 * 256 + 1


class Looks(NEPA):
    """A step that asks for a value, as a user's may."""

    def step(self, views):
        assert float(views[0].mean()) > -100
        return super().step([views[0][views[0].flatten(1).mean(1) > -100]])


def test_a_step_that_looks_at_values_is_counted_too(method):
    size = {"embed_dim": D, "depth": DEPTH, "num_heads": 2}
    other = Looks(8, 3, backbone="nepa_vit_tiny_patch14_224", img_size=16, patch_size=4, backbone_args=size)
    assert training_cost(other) == training_cost(method)
