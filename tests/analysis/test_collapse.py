import math

import pytest
import torch

from nepa_plugin.analysis.collapse import effective_rank, mean_pairwise_cosine


def test_identical_vectors():
    embeddings = torch.randn(1, 16).expand(50, -1)
    assert mean_pairwise_cosine(embeddings).item() == pytest.approx(1, abs=1e-5)
    assert effective_rank(embeddings).item() == pytest.approx(1, abs=1e-3)


def test_orthonormal_basis():
    basis = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))[0]
    assert mean_pairwise_cosine(basis).item() == pytest.approx(0, abs=1e-6)
    assert effective_rank(basis).item() == pytest.approx(12, abs=1e-3)


def test_equals_a_loop_over_pairs():
    embeddings = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 21)[:, None] + 0.5
    pairs = [
        torch.cosine_similarity(embeddings[i], embeddings[j], dim=0).item()
        for i in range(20)
        for j in range(20)
        if i != j
    ]
    assert mean_pairwise_cosine(embeddings).item() == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_effective_rank_of_known_singular_values():
    # singular values 3 and 1: shares 3/4 and 1/4; without centring
    embeddings = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(embeddings).item() == pytest.approx(math.exp(entropy), abs=1e-5)


@pytest.mark.parametrize("measure", [mean_pairwise_cosine, effective_rank])
def test_float32_under_autocast_and_bad_shapes(measure):
    embeddings = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    expected = measure(embeddings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = measure(embeddings)
        assert measure(embeddings.bfloat16()).dtype == torch.float32
    assert actual.shape == () and actual.dtype == torch.float32
    assert torch.equal(actual, expected)
    for wrong in (embeddings[:1], embeddings[0], embeddings[None]):
        with pytest.raises(ValueError, match="at least two"):
            measure(wrong)
