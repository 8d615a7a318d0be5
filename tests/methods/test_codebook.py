"""The codebook of BEiT and iGPT: which centre is nearest, how it is found, and when."""

import math

import pytest
import torch
from every_method import SHORT, curve, state, train

from nepa_plugin.methods.codebook import Codebook


def clusters(each=50, spread=0.05):
    """Points (4 * each, 2) about four corners, and which corner each belongs to."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.tensor([[0.0, 0.0], [0.0, 4.0], [4.0, 0.0], [4.0, 4.0]])
    labels = torch.arange(4).repeat_interleave(each)
    return corners[labels] + spread * torch.randn(4 * each, 2, generator=generator), labels


def test_the_id_is_that_of_the_nearest_centre():
    book = Codebook(7, 3)
    vectors = torch.randn(2, 5, 3)
    expected = torch.cdist(vectors, book.centers.expand(2, 7, 3)).argmin(dim=-1)
    assert torch.equal(book(vectors), expected)
    with torch.autocast("cpu", torch.bfloat16):  # near centres are told apart in float32
        book.centers[:2] = torch.tensor([[1.0, 0.0, 0.0], [1.001, 0.0, 0.0]])
        assert book(torch.tensor([[1.0, 0.0, 0.0], [1.001, 0.0, 0.0]])).tolist() == [0, 1]


def test_kmeans_finds_the_clusters_and_draws_from_its_own_generator():
    book = Codebook(4, 2)
    points, labels = clusters()
    before = torch.get_rng_state()
    centers = book.fitted(points)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(centers, book.fitted(points))
    means = torch.stack([points[labels == corner].mean(dim=0) for corner in range(4)])
    torch.testing.assert_close(centers[centers.sum(dim=1).argsort()[0]], means[0], rtol=0, atol=0.05)
    book.centers.copy_(centers)
    ids = book(points)
    assert all(len(ids[labels == corner].unique()) == 1 for corner in range(4)) and len(ids.unique()) == 4


def test_too_few_vectors_for_the_codebook():
    with pytest.raises(ValueError, match=r"codebook of 4 needs as many vectors, but the first batch .* has 3: lower"):
        Codebook(4, 2).fitted(torch.zeros(3, 2))


def test_a_run_fits_it_once_on_its_first_batch(tmp_path, monkeypatch):
    """That a resumed run keeps it is test_all's exact resume, of weights and buffers."""
    seen, fitted = [], Codebook.fitted
    monkeypatch.setattr(Codebook, "fitted", lambda self, vectors: seen.append(vectors) or fitted(self, vectors))
    run = train("igpt", tmp_path, *SHORT)
    centers = state(run)["codebook.centers"]
    assert len(seen) == 1 and seen[0].shape == (64 * 64 * 4, 3)
    assert torch.equal(centers, fitted(Codebook(32, 3), seen[0])) and len(centers.unique(dim=0)) > 16
    assert curve(run)[0] == pytest.approx(math.log(32))


def test_a_batch_that_is_too_small_ends_before_the_first_step(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train("beit", tmp_path, *SHORT, "--model.codebook_size", "5000")
    error = capsys.readouterr().err
    assert "A codebook of 5000 needs as many vectors, but the first batch of a device has 4096" in error
    assert "Traceback" not in error
