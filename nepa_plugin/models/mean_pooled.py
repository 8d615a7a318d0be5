"""Any Vision Transformer of timm with the classification head of fine-tuned NEPA, under a name of its own.

timm's own ``VisionTransformer`` has either a norm after the blocks or one after pooling; this head has both.
"""

from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from nepa_plugin.models.names import default_cfg

#: What a model's ``pretrained_cfg`` says of its images, but for their size.
IMAGE_KEYS = ("mean", "std", "crop_pct", "crop_mode", "interpolation")


class MeanPooledViT(nn.Module):
    """A ViT, the mean of its patch tokens, LayerNorm, and a linear layer that starts at zero.

    Args:
        architecture: timm's name of the ViT.
        architecture_args: Its arguments of ``timm.create_model``.
        num_classes: Number of classes; 0 for no head: the output is the mean.
        **overrides: Arguments of the ViT that override those above, such as ``img_size``.
    """

    def __init__(
        self,
        architecture: str,
        architecture_args: dict[str, Any] | None = None,
        num_classes: int = 0,
        **overrides: Any,
    ) -> None:
        super().__init__()
        args = dict(architecture_args or {}) | overrides | {"num_classes": 0}
        self.backbone: Any = timm.create_model(architecture, **args)
        self.backbone.reset_classifier(0, "")
        width: Any = self.backbone.num_features
        self.num_features, self.embed_dim, self.head_hidden_size = width, width, width
        self.num_prefix_tokens = self.backbone.num_prefix_tokens
        self.global_pool = "avg"
        self.reset_classifier(num_classes)

    @property
    def patch_embed(self) -> Any:
        """The ViT's patch embedding."""
        return self.backbone.patch_embed

    @property
    def blocks(self) -> Any:
        """The ViT's blocks."""
        return self.backbone.blocks

    @property
    def norm(self) -> Any:
        """The ViT's final norm."""
        return self.backbone.norm

    @property
    def cls_token(self) -> Any:
        """The ViT's class token, or ``None``."""
        return getattr(self.backbone, "cls_token", None)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)

    def get_classifier(self) -> nn.Module:
        """Return the linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new head in place, at zero."""
        self.num_classes = num_classes
        self.fc_norm = nn.LayerNorm(self.backbone.num_features, eps=1e-12) if num_classes else nn.Identity()
        self.head = nn.Linear(self.backbone.num_features, num_classes) if num_classes else nn.Identity()
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the tokens (B, T, D) after the final norm of images (B, C, H, W)."""
        tokens: Tensor = self.backbone.forward_features(images)
        return tokens

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, num_classes) of tokens (B, T, D), or what the linear layer is given."""
        pooled = self.fc_norm(tokens[:, self.num_prefix_tokens :].mean(dim=1))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) of images (B, C, H, W)."""
        return self.forward_head(self.forward_features(images))


default_cfgs = generate_default_cfgs({"mean_pooled_vit": default_cfg(first_conv="backbone.patch_embed.proj")})


@register_model
def mean_pooled_vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A :class:`MeanPooledViT`; its images are those of its ``architecture``, unless a config says otherwise."""
    # which timm would fill in from the images' description
    unused: Any = ("in_chans", "global_pool")
    model: Any = build_model_with_cfg(MeanPooledViT, "mean_pooled_vit", pretrained, kwargs_filter=unused, **kwargs)
    if kwargs.get("pretrained_cfg") is None:
        inner = model.backbone.pretrained_cfg
        model.pretrained_cfg |= {key: inner[key] for key in IMAGE_KEYS if key in inner}
    size = getattr(model.patch_embed, "img_size", None) or model.backbone.pretrained_cfg["input_size"][1:]
    model.pretrained_cfg["input_size"] = (model.patch_embed.proj.in_channels, *size)
    return model
