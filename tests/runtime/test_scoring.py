import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from nepa_plugin.evaluation import EvaluationOptions, LinearOptions
from nepa_plugin.evaluation.attentive import AttentiveOptions, AttentivePool, AttentiveProbe
from nepa_plugin.evaluation.linear import LinearProbe
from nepa_plugin.evaluation.processes import Runtime, quiet
from nepa_plugin.runtime.scoring import EvaluationDivergenceError, FiniteTraining, scores

CPU = Runtime("cpu", 1, torch.device("cpu"))


def _fit(probe, inputs, epochs):
    data = DataLoader(TensorDataset(inputs, torch.arange(len(inputs)) % 3), batch_size=6)
    with quiet(0):
        trainer = CPU.trainer(epochs, [FiniteTraining("--x.lr")])
        trainer.fit(probe, data, data)
    return trainer


def test_a_diverged_training_has_no_score():
    options = AttentiveOptions(lr=1e30, epochs=3)
    probe = AttentiveProbe(torch.nn.Identity(), AttentivePool(8, 4, 3, options), 3, options)
    with pytest.raises(
        EvaluationDivergenceError, match=r"after epoch \d of 3 a weight is not finite\. Lower --x\.lr\."
    ):
        _fit(probe, torch.randn(30, 4, 8), epochs=3)


def test_logits_that_overflow_have_no_score():
    """The weights are finite, what they predict is not."""
    probe = LinearProbe(torch.nn.Identity(), 6, 8, 3, LinearOptions())
    torch.nn.init.constant_(probe.classification_head.weight, 3e38)
    inputs = torch.zeros(30, 8)
    inputs[:7] = 2.0
    trainer = CPU.trainer(1)
    trainer.validate(probe, DataLoader(TensorDataset(inputs, torch.arange(30) % 3), batch_size=6), verbose=False)
    with pytest.raises(EvaluationDivergenceError, match="the prediction of 7 of the scored images is not finite"):
        scores(trainer, "--x.lr")


def test_finite_logits_are_scored():
    inputs = torch.eye(3).repeat(10, 1)
    trainer = _fit(LinearProbe(torch.nn.Identity(), 6, 3, 3, LinearOptions(lr=10.0)), inputs, epochs=10)
    assert scores(trainer, "--x.lr") == {"top1": 100.0, "top3": 100.0}


def test_a_learning_rate_that_float32_cannot_hold_is_refused():
    for options in (LinearOptions, AttentiveOptions):
        with pytest.raises(ValueError, match=r"lr must be in \(0, 1e\+30\], got 1e\+38"):
            options(lr=1e38)
    assert EvaluationOptions(linear=LinearOptions(lr=1e30)).linear.lr == 1e30
