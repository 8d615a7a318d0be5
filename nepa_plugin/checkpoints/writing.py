"""Backbone weights out: timm folders, published NEPA folders, and mmengine files."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from nepa_plugin.checkpoints.errors import CheckpointError
from nepa_plugin.checkpoints.published import to_nepa
from nepa_plugin.checkpoints.tensors import write_tensors
from nepa_plugin.runtime.files import part_of, remove_parts

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
#: Key of a training checkpoint under which it is stored how to rebuild the backbone (a timm ``config.json``).
BACKBONE_CONFIG_KEY = "nepa_backbone_config"
#: Key of a Lightning checkpoint for the prefix of the exported backbone's weights, ``"backbone."`` where it is absent.
BACKBONE_PREFIX_KEY = "nepa_backbone_prefix"


def save_backbone(
    model: nn.Module, folder: str | Path, layout: Literal["timm", "nepa"] = "timm", overwrite: bool = False
) -> Path:
    """Write a model to a folder that :func:`load_backbone` reads.

    Args:
        model: A timm model; for ``layout="nepa"`` a ``NepaViT``.
        folder: Where to write ``config.json`` and ``model.safetensors``.
        layout: ``"timm"``, which ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads, or ``"nepa"``, the
            published layout.
        overwrite: Replace these two files if they exist.

    Returns:
        The folder.

    Raises:
        FileExistsError: If one of the files exists and ``overwrite`` is off.
        CheckpointError: If the layout cannot hold the model.
    """
    if layout == "timm":
        _check_built_by_name(model)
    folder = Path(folder)
    present = [f for f in (CONFIG_NAME, WEIGHTS_NAME) if (folder / f).exists()]
    if present and not overwrite:
        raise FileExistsError(f"{folder / present[0]} exists; choose another folder.")
    if layout not in ("timm", "nepa"):
        raise ValueError(f"layout={layout!r} is neither 'timm' nor 'nepa'.")
    folder.mkdir(parents=True, exist_ok=True)
    remove_parts(folder)
    # Written beside the target first, so that an interruption leaves no half folder behind.
    with tempfile.TemporaryDirectory(dir=folder, prefix=part_of(folder).name + "-") as tmp:
        if layout == "timm":
            save_for_hf(model, tmp, safe_serialization=True)
        else:
            config, state = to_nepa(model)
            (Path(tmp) / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            save_file(state, Path(tmp) / WEIGHTS_NAME, metadata={"format": "pt"})
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            shutil.move(str(Path(tmp) / name), str(folder / name))
    return folder


def save_mmengine(model: nn.Module, path: str | Path) -> Path:
    """Write a model as the backbone of an mmengine checkpoint, which ``TimmViT`` and :func:`load_backbone` read.

    Args:
        model: A timm model that was built by name.
        path: The ``.pth`` file.

    Returns:
        The file.

    Raises:
        FileExistsError: If it exists.
        ValueError: If its name does not end with ``.pth``.
    """
    path = Path(path)
    if path.suffix != ".pth":
        raise ValueError(f"{path}: the name of an mmengine checkpoint ends with .pth.")
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another name.")
    weights = {f"backbone.vit.{name}": value for name, value in model.state_dict().items()}
    write_tensors({"meta": {}, "state_dict": weights, BACKBONE_CONFIG_KEY: backbone_config(model)}, path)
    return path


def backbone_config(model: nn.Module) -> dict[str, Any]:
    """Return the timm ``config.json`` of a model, for storing inside a training checkpoint."""
    from timm.models._hub import save_config_for_hf

    _check_built_by_name(model)
    with tempfile.TemporaryDirectory() as tmp:
        save_config_for_hf(model, str(Path(tmp) / CONFIG_NAME))
        config: dict[str, Any] = json.loads((Path(tmp) / CONFIG_NAME).read_text())
    return config


def _check_built_by_name(model: nn.Module) -> None:
    if not hasattr(model, "pretrained_cfg"):  # where timm records the name
        raise CheckpointError(
            f"This {type(model).__name__} was not built by name, so a timm config cannot say how to rebuild it: build "
            "it with timm.create_model."
        )
