import pytest
import torch

from nepa_plugin.methods.cost import training_cost
from nepa_plugin.speed import Case, matrix_peak, vit_training_flops


def test_the_formula_equals_the_count():
    case = Case(model="tiny", img_size=56, depth=2)
    counted = training_cost(case.method(), batch_size=1).gflops * 1e9
    assert vit_training_flops(192, 2, 16, 3 * 14 * 14) == pytest.approx(counted, rel=1e-6)


def test_vit_base_by_hand():
    """12 blocks of 12 D^2 weights, 257 tokens; forward, and twice as much backward."""
    weights = 12 * 12 * 768**2
    attention = 12 * 2 * 2 * 257**2 * 768
    expected = 3 * (2 * 257 * weights + attention) + 2 * (2 * 256 * 588 * 768)
    assert vit_training_flops(768, 12, 256, 588) == expected
    assert expected / 1e9 == pytest.approx(138.7, abs=0.1)


def test_the_peak_is_that_of_a_product():
    """The rate of a product of a thousand rows is within reach of what was measured as the peak."""
    peak = matrix_peak(torch.device("cpu"), torch.float32, size=512, repeats=5)
    assert 1e9 < peak < 1e14
