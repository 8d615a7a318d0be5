"""Segmentation transfer of the rows of a comparison: mmsegmentation in a process of its own, frozen and fine-tuned."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nepa_plugin.comparison.plan import ComparisonError, Run, last_line
from nepa_plugin.runtime.files import file_hash
from nepa_plugin.runtime.reading import read_json
from nepa_plugin.runtime.shipped import ShippedConfigError, find

RESULT = "result.json"
#: Columns of the report, and what is asked for.
MODES = {"segmentation_frozen": ["--frozen"], "segmentation": []}
_MODULE = [sys.executable, "-m", "nepa_plugin.segmentation.transfer"]


def check_segmentation(config: str) -> Path:
    """Check, before anything long starts, that segmentation can run.

    Args:
        config: An mmsegmentation config, or the name of a shipped one.

    Returns:
        Its path.

    Raises:
        ComparisonError: If there is no such config, mmsegmentation is not installed, or its images are not there.
    """
    try:
        path = find(config, "mmseg_configs")
    except ShippedConfigError as error:
        raise ComparisonError(f"--segment: {error}") from error
    if importlib.util.find_spec("mmseg") is None:
        raise ComparisonError("--segment needs mmsegmentation: pip install nepa-plugin[mmseg].")
    result = subprocess.run([*_MODULE, str(path), "--check"], capture_output=True, text=True)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["it cannot be checked"]
        raise ComparisonError(f"--segment {config}: {lines[-1].removeprefix('error: ')}")
    return path


def segment(
    run: Run, config: Path, start: Callable[[list[str], Path], int], say: Callable[[str], None]
) -> dict[str, Any]:
    """Segment with a row's backbone, frozen and fine-tuned, and return what both reached by column.

    Args:
        run: The row.
        config: The config.
        start: Starts a process that writes to a log, waits for it and returns its status.
        say: Called with a line of progress.

    Returns:
        Entries with ``mIoU`` in per cent.

    Raises:
        ComparisonError: If mmsegmentation ends with an error.
    """
    found = {}
    for column, arguments in MODES.items():
        folder = run.folder / "segmentation" / f"{config.stem}-{'frozen' if arguments else 'tuned'}"
        if not _is_done(folder, config):
            say(f"segmenting, {'frozen' if arguments else 'fine-tuned'}")
            folder.parent.mkdir(parents=True, exist_ok=True)
            log = folder.with_suffix(".log")
            command = [*_MODULE, str(config), "--backbone", str(run.folder / "backbone"), *arguments]
            command += ["--work-dir", str(folder), "--seed", str(run.seed)]
            status = start(command, log)
            if status or not _is_done(folder, config):
                raise ComparisonError(f"segmentation ended with status {status}: {last_line(log)} (see {log})")
        found[column] = read_json(folder / RESULT, {"mIoU": float}, f"Remove {folder}.")
    return found


def _is_done(folder: Path, config: Path) -> bool:
    result = folder / RESULT
    if not result.is_file():
        return False
    if read_json(result, {"config_sha256": str}, f"Remove {folder}.")["config_sha256"] != file_hash(config):
        raise ComparisonError(f"{folder} is of another {config.name} than it is now: remove that folder.")
    return True
