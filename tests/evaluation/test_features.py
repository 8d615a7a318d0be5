import pytest
import torch
from torch.utils.data import DataLoader

from nepa_plugin import NepaViT
from nepa_plugin.evaluation import extract_depth_features


def _model():
    torch.manual_seed(0)
    return NepaViT(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, init_values=0.5)


def _loader(count=7, batch_size=3):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    samples = [(images[i], i % 3, f"{i}.png") for i in range(count)]
    return images, DataLoader(samples, batch_size=batch_size)


def test_equals_embed_and_forward_intermediates():
    model, (images, loader) = _model(), _loader()
    features = extract_depth_features(model, loader, "cpu")

    model.eval()
    with torch.no_grad():
        tokens = {"embedding": model.embed(images)}
        final, pairs = model.forward_intermediates(images, norm=False, return_prefix_tokens=True, output_fmt="NLC")
    for i, (patches, prefix) in enumerate(pairs):
        tokens[f"block {i + 1}"] = torch.cat([prefix, patches], dim=1)
    tokens["final norm"] = final

    assert list(features.features) == ["embedding", "block 1", "block 2", "final norm"]
    for depth, expected in tokens.items():
        assert features.features[depth]["last"].shape == features.features[depth]["mean"].shape == (7, 32)
        torch.testing.assert_close(features.features[depth]["last"], expected[:, -1])
        torch.testing.assert_close(features.features[depth]["mean"], expected[:, 1:].mean(1))
    assert not torch.allclose(features.features["block 1"]["mean"], features.features["block 2"]["mean"], atol=1e-3)
    assert features.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_one_forward_pass_per_batch():
    model, (_, loader) = _model(), _loader()
    calls = []
    for module in (model.patch_embed, model.blocks[0], model.norm):
        module.register_forward_hook(lambda m, a, o: calls.append(m))
    extract_depth_features(model, loader, "cpu")
    assert len(calls) == 3 * len(loader)


def test_leaves_weights_modes_and_hooks_alone():
    model, (_, loader) = _model(), _loader()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    features = extract_depth_features(model, loader, "cpu")
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(module.training for module in model.modules())
    assert not any(block._forward_hooks for block in model.blocks)
    # evaluation mode: the coordinates of RoPE are not rescaled at random
    again = extract_depth_features(model, loader, "cpu")
    assert all(
        torch.equal(features.features[depth]["last"], again.features[depth]["last"]) for depth in features.features
    )


def test_restores_after_an_error():
    model = _model().train()
    with pytest.raises(ValueError, match="16"):
        extract_depth_features(model, [(torch.zeros(1, 3, 8, 8), [0], ["a"])], "cpu")
    assert model.training and not any(block._forward_hooks for block in model.blocks)


def test_no_images():
    with pytest.raises(ValueError, match="no images"):
        extract_depth_features(_model(), [], "cpu")
