import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader

from nepa_plugin import NepaViT
from nepa_plugin.evaluation import DepthFeatures, concat_depths, extract_depth_features
from nepa_plugin.evaluation.features import pool_names


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


def test_class_token_of_a_bidirectional_model_and_of_timm():
    model, (images, loader) = _model(), _loader()
    assert pool_names(model) == ("last", "mean")  # causal: the class token sees only itself
    model.set_attention("bidirectional")
    assert pool_names(model) == ("class", "last", "mean")

    torch.manual_seed(0)
    plain = timm.create_model(
        "plain_vit_tiny_patch14_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2
    ).eval()
    features = extract_depth_features(plain, loader).features
    with torch.no_grad():
        final = plain.forward_features(images)
    assert list(features) == ["embedding", "block 1", "block 2", "final norm"]
    assert list(features["block 1"]) == ["class", "last", "mean"]
    torch.testing.assert_close(features["final norm"]["class"], final[:, 0])
    torch.testing.assert_close(features["final norm"]["mean"], final[:, 1:].mean(1))
    with pytest.raises(ValueError, match="ResNet has no patch_embed, blocks, norm"):
        extract_depth_features(timm.create_model("resnet10t"), loader)


def test_only_what_is_wanted():
    model, (_, loader) = _model(), _loader()
    everything = extract_depth_features(model, loader)
    some = extract_depth_features(model, loader, wanted=[("block 1", "mean"), ("final norm", "tokens")])
    assert list(some.features) == ["block 1"] and list(some.features["block 1"]) == ["mean"]
    assert torch.equal(some.features["block 1"]["mean"], everything.features["block 1"]["mean"])
    assert some.tokens["final norm"].shape == (7, 17, 32)
    assert torch.equal(some.tokens["final norm"][:, -1], everything.features["final norm"]["last"])


def test_concat_values():
    parts = {name: {"mean": torch.tensor([[0.0, value]])} for name, value in (("a", 2.0), ("b", -3.0), ("c", 5.0))}
    joined = concat_depths(DepthFeatures(parts, torch.zeros(1)), k=2).features
    assert joined["a"]["concat"].tolist() == [[0.0, 1.0]]
    assert joined["b"]["concat"].tolist() == [[0.0, 1.0, 0.0, -1.0]]
    assert joined["c"]["concat"].tolist() == [[0.0, -1.0, 0.0, 1.0]]


def _gather_worker(rank, folder):
    from nepa_plugin.evaluation.features import gather_features

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for count in (7, 397):
        samples = _loader(count)[1].dataset
        mine = DataLoader([samples[i] for i in range(rank, count, 2)], batch_size=64)
        wanted = [("block 2", "mean"), ("final norm", "last"), ("final norm", "tokens")]
        whole = gather_features(extract_depth_features(_model(), mine, wanted=wanted), count)
        assert (whole is None) == (rank == 1)
        if whole is not None:
            torch.save((whole.features, whole.tokens, whole.labels), f"{folder}/{count}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    mp.spawn(_gather_worker, (str(tmp_path),), nprocs=2)
    for count in (7, 397):
        features, tokens, labels = torch.load(tmp_path / f"{count}.pt")
        samples = _loader(count)[1].dataset
        expected = extract_depth_features(
            _model(), DataLoader(samples, batch_size=64), wanted=[("block 2", "mean"), ("final norm", "tokens")]
        )
        assert labels.tolist() == [i % 3 for i in range(count)]
        torch.testing.assert_close(features["block 2"]["mean"], expected.features["block 2"]["mean"])
        torch.testing.assert_close(tokens["final norm"], expected.tokens["final norm"])
        assert torch.equal(features["final norm"]["last"], tokens["final norm"][:, -1])
