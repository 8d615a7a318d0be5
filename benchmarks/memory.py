"""The largest batch per GPU for NEPA's model sizes, calculated from what a step saves; needs no GPU.

python benchmarks/memory.py

Counts, on the CPU, every tensor that autograd keeps for a backward pass in bf16 autocast, and adds weights, gradients,
AdamW's moments and the moving average in float32. A tenth of the memory is left for the context, workspaces and
fragmentation. The step is the eager one; torch.compile keeps less.
"""

import gc

from rich.console import Console
from rich.table import Table

from nepa_plugin.speed import Case, largest_batch, step_memory
from nepa_plugin.speed.memory import GIB

GPUS = {"80 GiB": 80 * GIB, "139 GiB": 139 * GIB}


def main() -> None:
    table = Table(title="NEPA at 224 pixels, patch 14, bf16-mixed", title_justify="left")
    for column in ("model", "checkpointing", "state, GiB", "per image, MiB", *(f"batch on {name}" for name in GPUS)):
        table.add_column(column, justify="left" if column in ("model", "checkpointing") else "right")
    for model in ("base", "large", "huge"):
        for grad_checkpointing in (False, True):
            memory = step_memory(Case(model=model, grad_checkpointing=grad_checkpointing).method(), images=1)
            gc.collect()
            table.add_row(
                model,
                "yes" if grad_checkpointing else "no",
                f"{memory.state_bytes / GIB:.2f}",
                f"{memory.bytes_per_image / 2**20:.1f}",
                *(str(largest_batch(memory, size)) for size in GPUS.values()),
            )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
