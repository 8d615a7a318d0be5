"""Under autocast the network runs in bfloat16, and what is made of its outputs in float32."""

import pytest
import torch
from every_method import CONFIGS, METHODS, method_class
from PIL import Image
from torch import Tensor, nn

from nepa_plugin.methods.precision import in_float32
from nepa_plugin.training.configs import read_config


def gradients(name, autocast, whole_network=True):
    """Loss and gradients of a step; with ``whole_network``, its own arithmetic is in float32 under autocast, too."""
    torch.manual_seed(0)
    init = read_config(CONFIGS / f"{name}_digits.yaml")["model"]["init_args"]
    init["backbone_args"] |= {"depth": 1, "embed_dim": 32, "num_heads": 2}
    method = method_class(name)(batch_size_per_device=8, num_classes=0, **init)
    if name == "igpt":  # logits that start at zero are no test
        nn.init.normal_(method.head.weight)
    losses = {"criterion", "patch_criterion"}
    for part, module in method.named_modules():
        if (
            whole_network
            and part
            and part not in losses
            and not part.endswith("last_layer")
            and ".last_layer." not in part
        ):
            module.forward = torch.autocast("cpu", enabled=False)(module.forward)
    views = [torch.rand(8, *view.shape) for view in method.train_transform()(Image.new("RGB", (32, 32)))]
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = method.step(views)[0]
    loss.backward()
    return loss, {key: p.grad for key, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", METHODS)
def test_losses_and_their_gradients_do_not_depend_on_autocast(name):
    whole, expected = gradients(name, autocast=False)
    loss, actual = gradients(name, autocast=True)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(whole.item(), rel=1e-6)
    assert actual.keys() == expected.keys() and len(actual) > 10
    half = gradients(name, autocast=True, whole_network=False)[0]
    assert half.dtype == torch.float32 and half.item() != whole.item()
    for key, gradient in expected.items():
        torch.testing.assert_close(
            actual[key], gradient, rtol=1e-4, atol=1e-7, msg=lambda text, key=key: f"{key}{text}"
        )


def test_in_float32_casts_what_it_finds():
    seen = []

    def criterion(pair: list[Tensor], labels: Tensor, *, weight: Tensor) -> Tensor:
        seen.extend([pair[0].dtype, pair[1].dtype, labels.dtype, weight.dtype])
        return (pair[0] @ pair[1].T).sum() * weight

    half, labels = torch.ones(2, 2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.functional.linear(half.float(), half.float()).dtype == torch.bfloat16
        out = in_float32(criterion, [half, half.float()], labels, weight=torch.tensor(0.5))
    assert seen == [torch.float32, torch.float32, torch.long, torch.float32] and out.dtype == torch.float32
