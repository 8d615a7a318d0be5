"""The timm model names of this package; importing it registers them."""

from nepa_plugin.models.mean_pooled import IMAGE_KEYS, MeanPooledViT
from nepa_plugin.models.names import MODEL_SIZES, default_cfg
from nepa_plugin.models.sequences import EmbeddingSequence

__all__ = ["IMAGE_KEYS", "MODEL_SIZES", "EmbeddingSequence", "MeanPooledViT", "default_cfg"]
