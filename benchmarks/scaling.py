"""Paper calculation of step time and efficiency on many GPUs; its assumptions are the constants below.

python benchmarks/scaling.py

A step computes for ``images x FLOPs per image / (utilisation x peak)``, but at least as long as the host needs to queue
its kernels. The gradients of all but the last bucket are sent while the backward pass runs, which is two thirds of the
computation; what does not fit into that time, and the last bucket, come on top. A ring all-reduce of S bytes moves
2 (n - 1) / n x S per GPU.
"""

from rich.console import Console
from rich.table import Table

from nepa_plugin.models import MODEL_SIZES
from nepa_plugin.speed import Case, vit_training_flops

PEAK = 700e12  # bf16 matrix products of an H100 SXM; take what tools/benchmark.py measures on yours
UTILISATION = 0.45
HOST_SECONDS = {"base": 0.012, "large": 0.024, "huge": 0.032}  # to queue a step: 1 ms per block
LATENCY = 20e-6  # of one collective, per doubling of the number of GPUs
BUCKET = 25 * 2**20  # PyTorch's default
#: Bytes per second that each GPU sends in an all-reduce: within a node, and between nodes.
NETWORKS = {"8 x 400 Gbit/s per node": (300e9, 200e9), "1 x 100 Gbit/s per node": (300e9, 10e9)}
GPUS = (8, 64, 512)
GLOBAL_BATCH = 4096


def step_seconds(
    model: str, parameters: int, images: float, accumulated: int, gpus: int, bandwidths: tuple[float, float]
) -> float:
    """Return the seconds of an optimizer step with ``accumulated`` passes of ``images`` per GPU."""
    embed_dim, depth, _ = MODEL_SIZES[model]
    flops = images * vit_training_flops(embed_dim, depth, 256, 3 * 14**2)
    single = max(flops / (UTILISATION * PEAK), HOST_SECONDS[model])
    if gpus == 1:
        return accumulated * single
    sent = 2 * (gpus - 1) / gpus / (bandwidths[0] if gpus <= 8 else bandwidths[1])
    gradients = 4 * parameters
    exposed = max(0.0, gradients * sent - single * 2 / 3) + min(BUCKET, gradients) * sent
    return accumulated * single + exposed + LATENCY * gpus.bit_length()


def main() -> None:
    for network, bandwidths in NETWORKS.items():
        table = Table(title=f"{network}: milliseconds per step, and efficiency against one GPU", title_justify="left")
        for column in ("model", "GPUs", f"batch {GLOBAL_BATCH} in all", "512 per GPU (base), 256 (large, huge)"):
            table.add_column(column, justify="left" if column == "model" else "right")
        for model in HOST_SECONDS:
            parameters = sum(p.numel() for p in Case(model=model).method().backbone.parameters())
            most = 512 if model == "base" else 256
            for gpus in GPUS:
                cells = []
                for per_gpu in (GLOBAL_BATCH // gpus, most):
                    images = min(per_gpu, most)
                    seconds = step_seconds(model, parameters, images, per_gpu // images, gpus, bandwidths)
                    alone = step_seconds(model, parameters, most, 1, 1, bandwidths) * per_gpu / most
                    cells.append(f"{seconds * 1e3:.1f} ms, {100 * alone / seconds:.0f} %")
                table.add_row(f"{model} ({parameters / 1e6:.0f} M)" if gpus == GPUS[0] else "", str(gpus), *cells)
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
