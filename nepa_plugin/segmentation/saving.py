"""mmengine's checkpoints: written whole or not at all, read as tensors only, resumed from the newest that is whole."""

import zipfile
import zlib
from pathlib import Path
from typing import Any, ClassVar

from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner import CheckpointLoader

from nepa_plugin.checkpoints import CheckpointError, read_tensors
from nepa_plugin.runtime.files import remove_parts, whole_file

_BACKEND = "nepa_whole_file"


@register_backend(_BACKEND)
class WholeFileBackend(LocalBackend):
    """The local disk, where a file is replaced at once or not at all, and removed only when the next one is written.

    mmengine's hook removes the oldest and the previous best checkpoint before it writes the new one, so that a full
    disk or a kill in between would leave less than there was.
    """

    _late: ClassVar[list[str]] = []  # mmengine makes a backend for each call

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file, then remove those whose time has come.

        Raises:
            CheckpointError: If it cannot be written; what was there stays.
        """
        try:
            with whole_file(filepath) as part:
                part.write_bytes(obj)
        except OSError as error:
            raise CheckpointError(
                f"{filepath} could not be written: {error.strerror or error}. The checkpoints before it are kept. Make "
                "room, then add --resume, or choose another --work-dir."
            ) from error
        while self._late:
            path = self._late.pop()
            if Path(path) != Path(filepath) and Path(path).is_file():
                super().remove(path)

    def remove(self, filepath: str | Path) -> None:
        """Remove a file after the next :meth:`put`."""
        self._late.append(str(filepath))


@CheckpointLoader.register_scheme(prefixes="", force=True)
def load_from_local(filename: str, map_location: Any = None) -> Any:
    """Read a local file for mmengine, as tensors only. They stay on the CPU until the model takes them.

    Raises:
        FileNotFoundError: If there is none.
        CheckpointError: If it is damaged or holds other objects.
    """
    path = Path(filename).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {path}.")
    return read_tensors(path)


def write_whole_files(runner: Any) -> None:
    """Let the runner's ``CheckpointHook`` write through :class:`WholeFileBackend`, where it writes to this disk.

    Args:
        runner: mmengine's, before its hooks' ``before_train``.
    """
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook) and hook.backend_args is None and hook.file_client_args is None:
            folder = Path(hook.out_dir or runner.work_dir)
            if "://" not in str(hook.out_dir):
                hook.backend_args = {"backend": _BACKEND}
            for place in {folder, folder / Path(runner.work_dir).name, Path(runner.work_dir)}:
                remove_parts(place)


def holds_run(work_dir: str | Path) -> bool:
    """Whether a folder holds checkpoints of a run."""
    return (Path(work_dir) / "last_checkpoint").is_file() or bool(_checkpoints(Path(work_dir)))


def newest_whole_checkpoint(work_dir: str | Path, logger: Any) -> str | None:
    """Return the checkpoint to resume from: the last one or, where that is damaged or gone, the newest that is whole.

    Args:
        work_dir: Of the run.
        logger: Takes a warning for each one that is passed over.

    Returns:
        The file, ``None`` if there is none.

    Raises:
        CheckpointError: If there are some and all are damaged.
    """
    pointer = Path(work_dir) / "last_checkpoint"
    named = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
    last = [Path(named)] if named else []
    found = {path for folder in {Path(work_dir), *(path.parent for path in last)} for path in _checkpoints(folder)}
    others = sorted(found - set(last), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    damaged = []
    for path in [*last, *others]:
        try:
            _check_whole(path)
        except (CheckpointError, FileNotFoundError) as error:
            damaged.append(str(error))
            continue
        for text in damaged:
            logger.warning(f"{text} Goes on from {path} instead.")
        return str(path)
    if damaged:
        raise CheckpointError(
            f"None of the {len(damaged)} checkpoint(s) of {work_dir} can be resumed: {damaged[0]} Choose another "
            "--work-dir to start anew."
        )
    return None


def _checkpoints(folder: Path) -> list[Path]:
    return [path for pattern in ("iter_*.pth", "epoch_*.pth") for path in folder.glob(pattern)]


def _check_whole(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {path}.")
    read_tensors(path, mmap=True)
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()  # torch does not compare the checksums that it writes
    except (zipfile.BadZipFile, zlib.error, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
    if bad is not None:
        raise CheckpointError(f"{path} is damaged: {bad} has another checksum than was written.")
