"""Backbones of the commands that look at what is predicted."""

from nepa_plugin.checkpoints import load_backbone
from nepa_plugin.predictor import NepaViT


def load_predictor(source: str) -> NepaViT:
    """Load a NEPA backbone of images.

    Args:
        source: As for :func:`nepa_plugin.load_backbone`.

    Raises:
        ValueError: If it is another model.
    """
    model = load_backbone(source)
    if not isinstance(model, NepaViT) or hasattr(model, "input_dim"):
        raise ValueError(f"{source} holds a {type(model).__name__}, which predicts no next embedding.")
    return model
