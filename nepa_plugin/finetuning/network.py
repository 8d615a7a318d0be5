"""The network that is fine-tuned: a backbone with the published head."""

from collections.abc import Sequence
from typing import Any

import timm
from torch import nn

from nepa_plugin.checkpoints import backbone_config, name_classes
from nepa_plugin.finetuning.recipe import Recipe
from nepa_plugin.models import IMAGE_KEYS, MeanPooledViT
from nepa_plugin.predictor import NepaViT


def classifier(model: Any, classes: Sequence[str], recipe: Recipe) -> nn.Module:
    """Return a copy of a backbone with a classification head: mean of the patch tokens, LayerNorm, zero linear layer.

    Args:
        model: A timm ViT that was built by name; it is left as it is.
        classes: Names of the classes.
        recipe: Drop path, attention, and what is frozen.

    Returns:
        A network from images (B, C, H, W) to logits (B, number of classes), which a timm folder can hold: the predictor
        with its head, or a :class:`~nepa_plugin.models.MeanPooledViT`.

    Raises:
        ValueError: If an attention mode is asked for that the model cannot have.
    """
    if recipe.attention == "causal" and not isinstance(model, NepaViT):
        raise ValueError(f"{recipe.prefix}attention: {type(model).__name__} has bidirectional attention only.")
    images, model = model.pretrained_cfg, model.backbone if isinstance(model, MeanPooledViT) else model
    config = backbone_config(model)
    args = dict(config.get("model_args") or {}) | {"drop_path_rate": recipe.drop_path_rate}
    state = model.state_dict()
    network: Any
    if isinstance(model, NepaViT):
        if recipe.qk_norm_affine:
            args["qk_norm_affine"] = True
        network = timm.create_model(config["architecture"], **args)
        for name, value in network.state_dict().items():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                state.setdefault(name, value)  # ones
        network.load_state_dict(state)
        if recipe.attention is not None:
            network.set_attention(recipe.attention)
        network.reset_classifier(0, "")
        network.reset_classifier(len(classes))
    else:
        own = dict(architecture=config["architecture"], architecture_args=args)
        network = timm.create_model("mean_pooled_vit", num_classes=len(classes), **own)
        network.backbone.load_state_dict({name: state[name] for name in network.backbone.state_dict()})
    network.pretrained_cfg |= {key: images[key] for key in IMAGE_KEYS if key in images}
    name_classes(network, classes)
    if recipe.freeze_patch_embed:
        network.patch_embed.requires_grad_(False)
    return network
