"""NEPA (Next-Embedding Predictive Autoregression, arXiv 2512.16922) for lightly and mmsegmentation.

Importing the package registers the ``nepa_vit_*`` and ``plain_vit_*`` model names with timm.
"""

from nepa_plugin import models as models  # registers the names
from nepa_plugin.checkpoints import CheckpointError, load_backbone, save_backbone
from nepa_plugin.loss import NextEmbeddingLoss
from nepa_plugin.predictor import NepaViT
from nepa_plugin.runtime import moved as moved  # old names of modules

__version__ = "0.1.0"
__all__ = ["CheckpointError", "NepaViT", "NextEmbeddingLoss", "__version__", "load_backbone", "save_backbone"]
