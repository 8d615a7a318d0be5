"""The mmengine side: backbone, layer-wise learning-rate decay, and what makes mmsegmentation run on current torch.

Importing this package registers everything with mmengine; configs do it through ``custom_imports``.
"""

from nepa_plugin.segmentation import compat as compat  # first: mmsegmentation needs it to import
from nepa_plugin.segmentation.amp import BFloat16OptimWrapper
from nepa_plugin.segmentation.backbone import BackboneConfigHook, TimmViT
from nepa_plugin.segmentation.layer_decay import LayerDecayConstructor

__all__ = ["BFloat16OptimWrapper", "BackboneConfigHook", "LayerDecayConstructor", "TimmViT"]
