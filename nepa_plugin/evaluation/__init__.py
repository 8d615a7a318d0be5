"""Evaluation of backbones: kNN, linear and attentive probes, fine-tuning, and the readout of every depth."""

from nepa_plugin.evaluation.attentive import AttentiveOptions, attentive_probe, attentive_probe_tokens
from nepa_plugin.evaluation.features import DepthFeatures, concat_depths, extract_depth_features
from nepa_plugin.evaluation.finetune import FinetuneOptions, finetune
from nepa_plugin.evaluation.knn import knn_accuracy
from nepa_plugin.evaluation.linear import LinearOptions, linear_probe, logistic_probe
from nepa_plugin.evaluation.options import EvaluationOptions
from nepa_plugin.evaluation.readout import ReadoutRow, readout, readout_figure, readout_table
from nepa_plugin.evaluation.results import read_results, readout_rows, tables, write_results
from nepa_plugin.evaluation.run import PROTOCOLS, check_evaluation, evaluate

__all__ = [
    "PROTOCOLS",
    "AttentiveOptions",
    "DepthFeatures",
    "EvaluationOptions",
    "FinetuneOptions",
    "LinearOptions",
    "ReadoutRow",
    "attentive_probe",
    "attentive_probe_tokens",
    "check_evaluation",
    "concat_depths",
    "evaluate",
    "extract_depth_features",
    "finetune",
    "knn_accuracy",
    "linear_probe",
    "logistic_probe",
    "read_results",
    "readout",
    "readout_figure",
    "readout_rows",
    "readout_table",
    "tables",
    "write_results",
]
