"""Which config a row of a benchmark has, and of what size its backbone is."""

from pathlib import Path

from once import ROOT

#: NEPA's options, one at a time.
ALONE = [f"benchmarks/better/cifar10/nepa_{name}.yaml" for name in ("mlp", "horizon4", "infonce")]
#: The head with one and with both of the others, which the two benchmarks compare with NEPA as published.
BETTER = [f"benchmarks/better/cifar10/nepa_mlp_{name}.yaml" for name in ("horizon4", "infonce", "horizon4_infonce")]


def config_of(row: str) -> Path:
    """Return the file of a row: that of a method's name, or of a path from here or from the repository.

    Raises:
        SystemExit: If there is no such file.
    """
    if not row.endswith(".yaml"):
        path = ROOT / "lightly_configs" / f"{row}_cifar10.yaml"
    else:
        path = Path(row).resolve() if Path(row).is_file() else ROOT / row
    if not path.is_file():
        raise SystemExit(f"error: no file {path} of row {row}.")
    return path


def of_size(**sizes: int) -> list[str]:
    """Return the options that give a row's backbone these sizes, and leave its other arguments as they are."""
    return [part for name, size in sizes.items() for part in (f"--model.backbone_args.{name}", str(size))]
