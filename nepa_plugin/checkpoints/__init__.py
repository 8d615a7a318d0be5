"""Backbone weights in and out. See :func:`load_backbone` and :func:`save_backbone`."""

from nepa_plugin.checkpoints.backbones import open_backbone
from nepa_plugin.checkpoints.class_names import class_names, name_classes
from nepa_plugin.checkpoints.errors import CheckpointError
from nepa_plugin.checkpoints.features import weights_hash, write_best_feature
from nepa_plugin.checkpoints.files import Weights
from nepa_plugin.checkpoints.reading import (
    check_fit,
    check_same_order,
    load_backbone,
    load_weights,
    open_checkpoint,
    read_checkpoint,
    untrained_like,
)
from nepa_plugin.checkpoints.tensors import allow_mmengine_checkpoints, read_tensors, write_tensors
from nepa_plugin.checkpoints.writing import (
    BACKBONE_CONFIG_KEY,
    BACKBONE_PREFIX_KEY,
    backbone_config,
    save_backbone,
    save_mmengine,
)

__all__ = [
    "BACKBONE_CONFIG_KEY",
    "BACKBONE_PREFIX_KEY",
    "CheckpointError",
    "Weights",
    "allow_mmengine_checkpoints",
    "backbone_config",
    "check_fit",
    "check_same_order",
    "class_names",
    "load_backbone",
    "load_weights",
    "name_classes",
    "open_backbone",
    "open_checkpoint",
    "read_checkpoint",
    "read_tensors",
    "save_backbone",
    "save_mmengine",
    "untrained_like",
    "weights_hash",
    "write_best_feature",
    "write_tensors",
]
