"""The timm model names of this package; importing it registers them."""

from nepa_plugin.models.names import MODEL_SIZES, default_cfg

__all__ = ["MODEL_SIZES", "default_cfg"]
