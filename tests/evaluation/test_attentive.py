import pytest
import torch

from nepa_plugin.evaluation import AttentiveOptions, attentive_probe_tokens
from nepa_plugin.evaluation.attentive import AttentivePool, TokenSet
from nepa_plugin.evaluation.processes import Runtime

CPU = Runtime("cpu", 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small are fastest so, by far where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _tokens(count, seed):
    """The class is a direction that one token, at a random place, points in: the mean hardly shows it."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    tokens = torch.randn(count, 32, 16, generator=generator)
    place = torch.randint(32, (count,), generator=generator)
    tokens[torch.arange(count), place] = 6 * torch.eye(16)[labels]
    return TokenSet(tokens, labels)


@pytest.mark.slow
def test_finds_the_token_that_matters():
    train, val = _tokens(400, 0), _tokens(200, 1)
    state = torch.get_rng_state()
    options = AttentiveOptions(epochs=30, batch_size=50, lr=3e-3)
    first = attentive_probe_tokens(train, val, 4, CPU, options, seed=3)
    assert first["top1"] > 95 and first["top4"] == 100
    assert attentive_probe_tokens(train, val, 4, CPU, options, seed=3) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_shapes_and_parts():
    tokens = torch.randn(3, 17, 32)
    with_mlp = AttentivePool(32, 17, 5, AttentiveOptions(position_embedding=True))
    assert with_mlp(tokens).shape == (3, 5)
    assert with_mlp.pool.num_heads == 2 and with_mlp.pool.pos_embed.shape == (17, 32)
    plain = AttentivePool(32, 17, 5, AttentiveOptions(mlp=False, num_heads=4))
    assert plain(tokens).shape == (3, 5) and plain.pool.mlp is None and plain.pool.pos_embed is None
    shuffled = tokens[:, torch.randperm(17, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(plain.eval()(shuffled), plain(tokens))
    assert not torch.allclose(with_mlp.eval()(shuffled), with_mlp(tokens), atol=1e-3)
    with pytest.raises(ValueError, match="5 heads do not divide 32"):
        AttentivePool(32, 17, 5, AttentiveOptions(num_heads=5))
