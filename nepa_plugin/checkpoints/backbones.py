"""Opens what is fine-tuned or evaluated: a checkpoint, a named timm model, or a model that is in memory."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import is_model_pretrained
from torch import nn

from nepa_plugin.checkpoints.errors import CheckpointError
from nepa_plugin.checkpoints.files import Weights
from nepa_plugin.checkpoints.reading import load_backbone, read_checkpoint, untrained_like


def open_backbone(
    source: str | Path | nn.Module,
    model_args: dict[str, Any] | None = None,
    untrained: bool = False,
    seed: int = 0,
    weights: Weights = "average",
) -> nn.Module:
    """Return a network to fine-tune or evaluate.

    Args:
        source: Anything :func:`nepa_plugin.load_backbone` reads, a timm model name, or a model.
        model_args: Arguments of the model that override its own.
        untrained: Fresh weights in place of the source's. A timm name without published weights needs it.
        seed: Seed of fresh weights.
        weights: Of a run folder of the published code, as for :func:`nepa_plugin.load_backbone`.

    Returns:
        The model in evaluation mode, on the CPU unless it came as a model.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        CheckpointError: If it does not fit.
        ValueError: If a named model has no published weights, or they cannot be fetched.
    """
    args = dict(model_args or {})
    if isinstance(source, nn.Module):
        if args:
            raise ValueError("model_args: a model that is in memory is built already.")
        return untrained_like(source, seed) if untrained else source
    name = str(source)
    if Path(name).exists() or not timm.is_model(name):
        if not untrained:
            return load_backbone(source, weights, **args)
        architecture, own, _ = read_checkpoint(source, weights)
        return _fresh(architecture, own | args, seed)
    args = {"num_classes": 0} | args
    if untrained:
        return _fresh(name, args, seed)
    if not is_model_pretrained(name):
        raise ValueError(f"timm has no weights of {name}: pass --untrained to evaluate it as initialised.")
    try:
        return timm.create_model(name, pretrained=True, **args).eval()
    except Exception as error:  # the hub client fails in many ways, offline above all
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"timm could not fetch the weights of {name}: {reason}. Pass --untrained to evaluate it as initialised."
        ) from error


def _fresh(architecture: str, args: dict[str, Any], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return timm.create_model(architecture, **args).eval()
        except RuntimeError as error:
            raise CheckpointError(f"cannot build architecture {architecture!r}: {error}") from error
