"""Backbone weights in and out. See :func:`load_backbone` and :func:`save_backbone`."""

from nepa_plugin.checkpoints.errors import CheckpointError
from nepa_plugin.checkpoints.reading import (
    BACKBONE_CONFIG_KEY,
    BACKBONE_PREFIX_KEY,
    check_fit,
    load_backbone,
    load_weights,
    read_checkpoint,
    untrained_like,
)
from nepa_plugin.checkpoints.tensors import allow_mmengine_checkpoints, read_tensors, write_tensors
from nepa_plugin.checkpoints.writing import backbone_config, save_backbone

__all__ = [
    "BACKBONE_CONFIG_KEY",
    "BACKBONE_PREFIX_KEY",
    "CheckpointError",
    "allow_mmengine_checkpoints",
    "backbone_config",
    "check_fit",
    "load_backbone",
    "load_weights",
    "read_checkpoint",
    "read_tensors",
    "save_backbone",
    "untrained_like",
    "write_tensors",
]
