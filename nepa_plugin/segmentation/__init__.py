"""The mmengine side: backbone, layer-wise learning-rate decay, and what makes mmsegmentation run on current torch.

Importing this package registers everything with mmengine; configs do it through ``custom_imports``.
"""

from nepa_plugin.segmentation import compat as compat  # first: mmsegmentation needs it to import
from nepa_plugin.segmentation.amp import BFloat16OptimWrapper
from nepa_plugin.segmentation.backbone import TimmViT
from nepa_plugin.segmentation.boundary import print_bad_input_in_one_line
from nepa_plugin.segmentation.datasets import ADE20K, CamVid, DigitScenes, SegmentationFolder
from nepa_plugin.segmentation.errors import ConfigError, DatasetError, DivergenceError
from nepa_plugin.segmentation.hooks import BatchSizeHook, CheckpointGuardHook, ClassCountHook
from nepa_plugin.segmentation.layer_decay import LayerDecayConstructor
from nepa_plugin.segmentation.metrics import CountedIoUMetric
from nepa_plugin.segmentation.options import ConfigCheckHook
from nepa_plugin.segmentation.resuming import ExactResumeHook, ResumableSampler

__all__ = [
    "ADE20K",
    "BFloat16OptimWrapper",
    "BatchSizeHook",
    "CamVid",
    "CheckpointGuardHook",
    "ClassCountHook",
    "ConfigCheckHook",
    "ConfigError",
    "CountedIoUMetric",
    "DatasetError",
    "DigitScenes",
    "DivergenceError",
    "ExactResumeHook",
    "LayerDecayConstructor",
    "ResumableSampler",
    "SegmentationFolder",
    "TimmViT",
]

print_bad_input_in_one_line()
