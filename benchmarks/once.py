"""What scripts share that run many commands, over several sittings, into one folder."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from nepa_plugin.runtime.files import file_hash, whole_file, write_json

ROOT = Path(__file__).parents[1]


def once(folder: Path, command: Sequence[str], config: Any, result: str, moving: Sequence[str] = ()) -> Any:
    """Run a Python command to its end, unless it has been, and return what it has written.

    Args:
        folder: The command's own folder. FOLDER.log takes what it prints, FOLDER.request.json what it was asked for.
        command: Arguments of Python.
        config: What the command depends on and does not say: the content of its config, the hash of its weights.
        result: The JSON file in ``folder`` that the command writes last.
        moving: Further arguments, which may be others next time: those that say where files are.

    Returns:
        The contents of the JSON file.

    Raises:
        SystemExit: If the command fails, or the folder was made by another one.
    """
    asked, log = folder.with_name(f"{folder.name}.request.json"), folder.with_name(f"{folder.name}.log")
    wanted = {"command": [argument.replace(f"{ROOT}{os.sep}", "") for argument in command], "config": config}
    before = json.loads(asked.read_text()) if asked.is_file() else {"command": [], "config": None}
    if before != wanted and (asked.is_file() or folder.exists()):
        raise SystemExit(
            f"error: {folder} was made with {_other(before['command'], wanted['command'])}: choose another --out, or "
            f"delete it and {asked.name} to run it again."
        )
    if not (folder / result).is_file():
        write_json(asked, wanted)
        with log.open("a") as file:
            env = dict(os.environ, PYTHONPATH=str(ROOT))
            if subprocess.run([sys.executable, *command, *moving], stdout=file, stderr=file, env=env).returncode:
                raise SystemExit(f"error: {' '.join(command[:2])} failed; see {log}")
    return json.loads((folder / result).read_text())


def weights(backbone: Path) -> str:
    """Return the hash of a backbone's weights."""
    return file_hash(backbone / "model.safetensors")


def _other(before: Sequence[str], now: Sequence[str]) -> str:
    """Return the first difference of two commands, in words."""
    for old, new in zip_longest(before, now, fillvalue="nothing"):
        if old != new:
            return f"{old} and not {new}"
    return "another config, or other weights"


def keep(path: Path, row: dict[str, object], keys: Sequence[str]) -> list[dict[str, str]]:
    """Put a row into a CSV file, in the place of the one with the same keys, and return all rows that are there now."""
    rows: list[dict[str, str]] = []
    if path.is_file():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    new = {name: str(value) for name, value in row.items()}
    same = [place for place, old in enumerate(rows) if all(old[key] == new[key] for key in keys)]
    if same:
        rows[same[0]] = new
    else:
        rows.append(new)
    with whole_file(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(new))
        writer.writeheader()
        writer.writerows(rows)
    return rows
