"""The floors of a comparison: the backbones that its methods train, with fresh weights."""

import json
from typing import Any

from nepa_plugin.checkpoints import backbone_config, load_backbone, save_backbone, untrained_like, weights_hash
from nepa_plugin.comparison.plan import UNTRAINED, Comparison, Run, folder_name


def untrained(runs: list[Run], what: Comparison) -> list[Run]:
    """Write each distinct backbone of the comparison with fresh weights, once per seed."""
    floors: dict[tuple[str, int], Run] = {}
    backbones: dict[str, list[Any]] = {}
    for run in runs:
        if not run.trained:
            continue
        mode = f" {run.summary['attention']}" if run.summary["backbone_class"] == "NepaViT" else ""
        name = f"{UNTRAINED}{run.summary['backbone_class']}{mode}"
        same = backbones.setdefault(name, [])
        backbone = _architecture(run.summary["backbone"])
        if backbone not in same:
            same.append(backbone)
        number = same.index(backbone) + 1
        name += f" {number}" if number > 1 else ""
        if (name, run.seed) in floors:
            continue
        floor = Run(name, run.seed, what.out / "untrained" / folder_name(name.replace(" ", "_")) / f"seed{run.seed}")
        if not (floor.folder / "backbone" / "model.safetensors").is_file():
            model = untrained_like(load_backbone(run.folder / "backbone"), seed=run.seed)
            save_backbone(model, floor.folder / "backbone", overwrite=True)
        floors[name, run.seed] = floor
    return sorted(floors.values(), key=lambda run: (run.name, run.seed))


def alike(floors: list[Run]) -> list[list[Run]]:
    """Return floors in groups, of which each is one network: of one seed, and alike but for the attention."""
    groups: dict[tuple[int, str, str], list[Run]] = {}
    for run in floors:
        try:
            model = load_backbone(run.folder / "backbone")
        except (ValueError, OSError):  # which its own evaluation says
            groups[run.seed, run.name, ""] = [run]
            continue
        network = _architecture(backbone_config(model))
        network["model_args"].pop("attention", None)
        groups.setdefault((run.seed, json.dumps(network, sort_keys=True), weights_hash(model)), []).append(run)
    return list(groups.values())


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    """Return what of a backbone's config its fresh weights depend on."""
    other = ("dynamic_img_size", "drop_path_rate", "predicts")
    args = {key: value for key, value in config.get("model_args", {}).items() if key not in other}
    return {"architecture": config["architecture"], "model_args": args}
