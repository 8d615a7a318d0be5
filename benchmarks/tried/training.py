"""What the trainings of a comparison logged: the largest gradient norm, the largest rise of the loss, and the rank.

python benchmarks/tried/training.py runs/tried

The gradient's norm is before clipping; the loss rises between logged steps; the effective rank of the embeddings is the
mean of the last five logged values.
"""

import argparse
from itertools import pairwise
from pathlib import Path
from statistics import mean

from nepa_plugin.training.curves import read_metrics


def main() -> None:
    """Print a line per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of a comparison")
    for path in sorted(parser.parse_args().out.glob("*/seed*/metrics.csv")):
        curves = {name: [value for _, value in curve] for name, curve in read_metrics(path).items()}
        losses = curves["train_loss"]
        rise = max(after - before for before, after in pairwise(losses))
        rank = mean(curves["embedding_effective_rank"][-5:])
        run = f"{path.parents[1].name}, {path.parent.name}"
        print(f"{run}: gradient {max(curves['grad_norm']):.2f}, rise {rise:.3f}, rank {rank:.1f}")


if __name__ == "__main__":
    main()
