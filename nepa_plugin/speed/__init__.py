"""How fast a training step is, where its time and memory go, and how near the hardware's limit it comes."""

from nepa_plugin.speed.cases import PLAIN, Case, cases
from nepa_plugin.speed.flops import matrix_peak, vit_training_flops
from nepa_plugin.speed.kernels import kernel_table, profile_step
from nepa_plugin.speed.memory import largest_batch, step_memory
from nepa_plugin.speed.run import Options, benchmark, table

__all__ = [
    "PLAIN",
    "Case",
    "Options",
    "benchmark",
    "cases",
    "kernel_table",
    "largest_batch",
    "matrix_peak",
    "profile_step",
    "step_memory",
    "table",
    "vit_training_flops",
]
