"""Layer-wise learning-rate decay for timm's Vision Transformers in mmengine."""

import re

from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from nepa_plugin.segmentation.errors import ConfigError

_BLOCK = re.compile(r"backbone\.vit\.blocks\.(\d+)\.")


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Optimizer constructor with layer-wise learning-rate decay for :class:`TimmViT` backbones.

    With L blocks and decay d, block i trains with ``lr * d**(L - i)``, everything before the first block (patch and
    position embedding, class token) with ``lr * d**(L + 1)``, and the rest (final norm, neck, heads) with ``lr``: the
    rule of BEiT and MAE in mmsegmentation. Vectors (biases, norms, LayerScale) get no weight decay. Frozen parameters
    are left out.

    Args:
        optim_wrapper_cfg: mmengine's, with the optimizer's ``lr`` and ``weight_decay``.
        paramwise_cfg: ``dict(layer_decay=d)`` with d in (0, 1]; 1 turns the decay off.

    Raises:
        ConfigError: If ``layer_decay`` is missing or out of range, there are other keys, or the model has no such
            backbone.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        paramwise_cfg = paramwise_cfg or {}
        decay = paramwise_cfg.get("layer_decay")
        if set(paramwise_cfg) != {"layer_decay"} or not isinstance(decay, int | float) or not 0 < decay <= 1:
            raise ConfigError(f"paramwise_cfg={dict(paramwise_cfg)}: give exactly dict(layer_decay=d) with 0 < d <= 1.")
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        if self.base_lr is None or self.base_wd is None:
            raise ConfigError("Layer decay needs lr and weight_decay in the optimizer's config.")

    def add_params(self, params: list[dict], module: nn.Module, **kwargs: object) -> None:
        """Append one group per layer and kind of parameter to ``params``, from the input to the heads."""
        blocks = getattr(getattr(getattr(module, "backbone", None), "vit", None), "blocks", None)
        if blocks is None:
            raise ConfigError(f"{type(module).__name__} has no TimmViT backbone, which layer decay is for.")
        depth, decay = len(blocks), self.paramwise_cfg["layer_decay"]
        groups: dict[tuple[int, bool], dict] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            layer, decays = _layer_id(name, depth), parameter.ndim > 1
            scale = decay ** (depth + 1 - layer)
            group = groups.setdefault(
                (layer, decays),
                {
                    "params": [],
                    "lr": self.base_lr * scale,
                    "weight_decay": self.base_wd if decays else 0.0,
                    "lr_scale": scale,
                    "name": f"{_layer_name(layer, depth)}{'' if decays else ' (no weight decay)'}",
                },
            )
            group["params"].append(parameter)
        ordered = [groups[key] for key in sorted(groups, key=lambda key: (key[0], not key[1]))]
        params.extend(ordered)
        if is_main_process():
            lines = [
                f"  {group['name']:<40} lr {group['lr']:.3g}  weight decay {group['weight_decay']:g}  "
                f"{sum(p.numel() for p in group['params']):>12,} parameters"
                for group in ordered
            ]
            print_log("\n".join([f"Parameter groups, layer decay {decay:g}:", *lines]), logger="current")


def _layer_id(name: str, depth: int) -> int:
    if match := _BLOCK.match(name):
        return int(match[1]) + 1
    if name.startswith("backbone.vit.") and not re.match(r"backbone\.vit\.(norm|fc_norm|head)\b", name):
        return 0
    return depth + 1


def _layer_name(layer: int, depth: int) -> str:
    return "embedding" if layer == 0 else f"block {layer - 1}" if layer <= depth else "final norm, neck and heads"
