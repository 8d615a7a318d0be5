"""``results.json``: what was measured, and everything needed to measure it again."""

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from nepa_plugin.evaluation.readout import ReadoutRow, readout_table
from nepa_plugin.runtime.files import write_json
from nepa_plugin.runtime.reading import FileContentError, read_json

RESULTS_NAME = "results.json"
#: Points by which fine-tuning may be below the linear probe without a word.
BELOW_PROBE = 1.0


def write_results(results: dict[str, Any], folder: str | Path) -> Path:
    """Write results into a folder at once; what it holds of other protocols stays.

    Results of other weights that are there are moved aside, to ``results-1.json`` and so on.

    Args:
        results: As :func:`nepa_plugin.evaluation.evaluate` returns them.
        folder: The folder; made if need be.

    Returns:
        The file.

    Raises:
        ValueError: If the folder holds results on other images, or a damaged file.
    """
    folder = Path(folder)
    path = folder / RESULTS_NAME
    before = read_results(folder)
    if before is not None:
        check_same_data(before, results, path)
        if before["backbone"]["weights_sha256"] == results["backbone"]["weights_sha256"]:
            results = results | {"protocols": before["protocols"] | results["protocols"]}
        else:
            put_aside(folder)
    write_json(path, results)
    return path


def put_aside(folder: Path) -> None:
    """Rename a folder's results to ``results-1.json``, or the next number that is free."""
    n = 1
    while (folder / f"results-{n}.json").exists():
        n += 1
    (folder / RESULTS_NAME).rename(folder / f"results-{n}.json")


def read_results(folder: str | Path) -> dict[str, Any] | None:
    """Return a folder's results, ``None`` where there are none.

    Raises:
        ValueError: If the file is damaged.
    """
    path = Path(folder) / RESULTS_NAME
    if not path.is_file():
        return None
    remedy = "Remove it, or choose another --out."
    results = read_json(path, {"backbone": dict, "data": dict, "protocols": dict}, remedy)
    data = results["data"]
    if (
        not isinstance(results["backbone"].get("weights_sha256"), str)
        or not all(isinstance(data.get(key), int) for key in ("train_images", "val_images"))
        or not isinstance(data.get("classes"), list)
        or "source" not in data
        or not all(isinstance(entry, dict) for entry in results["protocols"].values())
    ):
        raise FileContentError(f"{path} is damaged: it is not a file of results. {remedy}")
    return results


def check_same_data(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Raise ``ValueError`` if two results are on different images; a copy of the images is the same.

    Results that were written before there was ``images_sha256`` tell by the classes and the numbers of images.
    """
    keys = ("classes", "train_images", "val_images", "images_sha256")
    one, other = before["data"], now["data"]
    if any(key in one and key in other and one[key] != other[key] for key in keys):
        raise ValueError(
            f"{path} holds results on other images ({one['source']}, {one['train_images']} for training, "
            f"{len(one['classes'])} classes), not on {other['source']}. Choose another --out."
        )


def readout_rows(results: dict[str, Any], name: str = "pretrained") -> dict[str, list[ReadoutRow]]:
    """Return the readout of results as :func:`readout_table` and :func:`readout_figure` take it."""
    entry = results["protocols"]["readout"]
    keys = {name: "rows", "untrained": "untrained_rows"}
    return {model: [ReadoutRow(**row) for row in entry[key]] for model, key in keys.items() if key in entry}


def too_short(tuned: float, probe: float) -> str | None:
    """Return in words that fine-tuning ends below what a linear classifier reads from the network frozen, if it does.

    Args:
        tuned: Accuracy of fine-tuning in per cent.
        probe: That of the linear probe.
    """
    if probe - tuned <= BELOW_PROBE:
        return None
    return (
        f"fine-tuned, {tuned:.1f} %, is below the linear probe of its frozen features, {probe:.1f} %: its fine-tuning "
        "is too short, or its learning rate too small, to tell what the network can do."
    )


def tables(results: dict[str, Any]) -> list[Table]:
    """Return the results as tables for ``rich``: one of the protocols, and one per network of the readout."""
    entries = results["protocols"]
    found = []
    if any("top1" in entry for entry in entries.values()):
        table = Table("protocol", "top-1, %", "seconds", title=escape(str(results["backbone"]["source"])))
        for protocol, entry in entries.items():
            if "top1" in entry:
                table.add_row(protocol, f"{entry['top1']:.1f}", f"{entry['seconds']:.1f}")
        if "finetune" in entries and "linear" in entries:
            table.caption = too_short(entries["finetune"]["top1"], entries["linear"]["top1"])
        found.append(table)
    if "readout" in entries:
        for model, rows in readout_rows(results).items():
            found.append(readout_table({model: rows}, title=f"{model}: top-1 accuracy by depth, %"))
    return found
