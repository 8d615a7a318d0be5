"""Evaluation of frozen backbones."""

from nepa_plugin.evaluation.features import DepthFeatures, extract_depth_features
from nepa_plugin.evaluation.knn import knn_accuracy
from nepa_plugin.evaluation.linear import logistic_probe
from nepa_plugin.evaluation.readout import ReadoutRow, readout, readout_table

__all__ = [
    "DepthFeatures",
    "ReadoutRow",
    "extract_depth_features",
    "knn_accuracy",
    "logistic_probe",
    "readout",
    "readout_table",
]
