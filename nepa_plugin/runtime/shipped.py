"""The configs that come with the package, found by name: those of the checkout, or the wheel's copies of them."""

import difflib
from pathlib import Path

#: Where the configs of pretraining are: by method, and NEPA's ablations and orders of patches.
PRETRAINING = ("lightly_configs", "lightly_configs/ablations", "lightly_configs/orders")
FOLDERS = (*PRETRAINING, "lightly_configs/finetune", "mmseg_configs")


class ShippedConfigError(ValueError):
    """No shipped config has this name; the message names the nearest."""


def folder(name: str) -> Path:
    """Return one of :data:`FOLDERS`: the wheel holds them inside the package, a checkout beside it."""
    package = Path(__file__).parents[1]
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def configs(*folders: str) -> dict[str, Path]:
    """Return all shipped configs of some of :data:`FOLDERS` (of all by default), by name.

    Files that are only there to be built on, ``base.yaml`` and those in ``_base_``, are left out.
    """
    files = [path for name in folders or FOLDERS for path in sorted(folder(name).iterdir())]
    return {path.stem: path for path in files if path.suffix in (".yaml", ".py") and path.stem != "base"}


def find(config: str | Path, *folders: str) -> Path:
    """Return the path of a config: the file, if there is one, or else the shipped config of that name.

    Args:
        config: A path, or a name such as ``nepa_demo``, ``nepa_demo.yaml`` or ``lightly_configs/nepa_demo.yaml``.
        folders: Which of :data:`FOLDERS` to look in; all by default. The first of :data:`PRETRAINING` stands for them.

    Raises:
        ShippedConfigError: If there is neither.
    """
    return Path(config) if Path(config).is_file() else named(config, *folders)


def named(name: str | Path, *folders: str) -> Path:
    """Return the path of the shipped config of that name; arguments and errors as for :func:`find`."""
    path, looked_in = Path(name), PRETRAINING if folders == PRETRAINING[:1] else folders or FOLDERS
    known, parent = configs(*looked_in), str(path.parent)
    if parent in (".", *looked_in):
        found = (known if parent == "." else configs(parent)).get(path.stem)
        if found is not None and path.name in (found.stem, found.name):
            return found
    near = difflib.get_close_matches(path.stem, known, n=3)
    nearest = f"The nearest: {', '.join(near)}. " if near else ""
    raise ShippedConfigError(
        f"No config file at {name}, and no shipped config of that name. {nearest}`nepa configs` lists them."
    )


def summary(path: Path) -> str:
    """Return the first sentence of the comment at the top of a config."""
    comment: list[str] = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
        if comment[-1].endswith((".", ":")):
            break
    return " ".join(comment).split(". ")[0].rstrip(".:")
