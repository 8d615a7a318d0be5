"""``results.json``: what was measured, and everything needed to measure it again."""

import json
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from nepa_plugin.evaluation.readout import ReadoutRow, readout_table
from nepa_plugin.runtime.files import write_json

RESULTS_NAME = "results.json"


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
            n = 1
            while (folder / f"results-{n}.json").exists():
                n += 1
            path.rename(folder / f"results-{n}.json")
    write_json(path, results)
    return path


def read_results(folder: str | Path) -> dict[str, Any] | None:
    """Return a folder's results, ``None`` where there are none.

    Raises:
        ValueError: If the file is damaged.
    """
    path = Path(folder) / RESULTS_NAME
    if not path.is_file():
        return None
    try:
        results: dict[str, Any] = json.loads(path.read_text())
        if not {"backbone", "data", "protocols"} <= set(results):
            raise KeyError("backbone, data or protocols")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of results: {error}. Remove it, or choose another --out.") from error
    return results


def check_same_data(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Raise ``ValueError`` if two results are on different images."""
    keys = ("classes", "train_images", "val_images")
    if any(before["data"][key] != now["data"][key] for key in keys):
        raise ValueError(
            f"{path} holds results on other images ({before['data']['source']}, "
            f"{before['data']['train_images']} for training, {len(before['data']['classes'])} classes), not on "
            f"{now['data']['source']}. Choose another --out."
        )


def readout_rows(results: dict[str, Any], name: str = "pretrained") -> dict[str, list[ReadoutRow]]:
    """Return the readout of results as :func:`readout_table` and :func:`readout_figure` take it."""
    entry = results["protocols"]["readout"]
    keys = {name: "rows", "untrained": "untrained_rows"}
    return {model: [ReadoutRow(**row) for row in entry[key]] for model, key in keys.items() if key in entry}


def tables(results: dict[str, Any]) -> list[Table]:
    """Return the results as tables for ``rich``: one of the protocols, and one per network of the readout."""
    entries = results["protocols"]
    found = []
    if any("top1" in entry for entry in entries.values()):
        table = Table("protocol", "top-1, %", "seconds", title=escape(str(results["backbone"]["source"])))
        for protocol, entry in entries.items():
            if "top1" in entry:
                table.add_row(protocol, f"{entry['top1']:.1f}", f"{entry['seconds']:.1f}")
        found.append(table)
    if "readout" in entries:
        for model, rows in readout_rows(results).items():
            found.append(readout_table({model: rows}, title=f"{model}: top-1 accuracy by depth, %"))
    return found
