"""A run's folder: one run at a time writes to it, and the next one knows what is there."""

from pathlib import Path
from typing import IO

from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from nepa_plugin.checkpoints import BACKBONE_CONFIG_KEY, CheckpointError, check_fit, check_same_order, read_tensors
from nepa_plugin.checkpoints.errors import listing
from nepa_plugin.runtime.files import remove_parts
from nepa_plugin.runtime.locks import LOCK, FolderInUseError, lock_folder

FAILED = "failed-"
#: What a run writes before its first checkpoint.
_EARLY = ("checkpoints", "config", "hparams.yaml", "metrics", "tensorboard")


class UsageError(ValueError):
    """An option is wrong; the message says which and what to do."""


class RunFolder:
    """What a run finds in its folder, and what it may do there.

    Args:
        path: The folder; it need not exist.

    Raises:
        UsageError: If it can be no folder's name.
    """

    def __init__(self, path: str | Path) -> None:
        if "\0" in str(path):
            raise UsageError(f"--run_dir: {str(path)!r} has a null byte, which no file system takes.")
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self._lock: IO[str] | None = None

    def resume_from(self, wanted: str | None, first: bool = True) -> Path | None:
        """Decide what to resume from, and refuse to write over another run.

        Args:
            wanted: ``"last"``, ``"auto"`` (the same if there is a checkpoint), a ``.ckpt`` file, or nothing.
            first: Whether this process starts before any other of the run has written.

        Returns:
            A checkpoint that can be read, if the run is to be resumed.

        Raises:
            UsageError: If there is no such checkpoint, or the folder holds something else.
            CheckpointError: If all checkpoints are damaged.
        """
        if wanted in ("last", "auto"):
            if (found := self._newest()) is not None:
                return found
            if wanted == "last":
                reason = "it failed before its first checkpoint" if self._failed() else "there is no run"
                raise UsageError(
                    f"--ckpt_path last: there is no {self.checkpoints / 'last.ckpt'}: {reason}. Leave the option out "
                    "to start a new run."
                )
        resume = Path(wanted) if wanted not in (None, "last", "auto") else None
        if resume is not None and not resume.is_file():
            raise UsageError(f"--ckpt_path: no checkpoint at {resume}. Give a .ckpt file, 'last' or 'auto'.")
        if resume is not None:
            read_tensors(resume, mmap=True)
        own = resume is not None and self.path.resolve() in resume.resolve().parents
        if first and not own and wanted != "auto" and self._contents() and not self._failed():
            raise UsageError(
                f"The run folder {self.path} exists. Choose another with --run_dir, or go on with --ckpt_path last."
            )
        return resume

    def _newest(self) -> Path | None:
        """Return last.ckpt, or the one before it if that is damaged."""
        last, previous = self.checkpoints / "last.ckpt", self.checkpoints / "previous.ckpt"
        damaged: CheckpointError | None = None
        for path in (last, previous):
            if not path.is_file():
                continue
            try:
                read_tensors(path, mmap=True)
            except CheckpointError as error:
                damaged = damaged or error
                continue
            if path == previous:
                why = f"{damaged}." if damaged else f"There is no {last}."
                rank_zero_warn(f"{why} Going on from the checkpoint before it, {path}.")
            return path
        if damaged is not None:
            raise CheckpointError(f"{damaged}. There is no other checkpoint in {self.checkpoints}: start a new run.")
        return None

    def _contents(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        kept = (LOCK, FAILED)  # which a run may find and leave
        return [path for path in self.path.iterdir() if not path.name.startswith(kept)]

    def _failed(self) -> bool:
        """Whether what is there, and nothing else, is a run that ended before its first checkpoint."""
        return (
            (self.path / "config.yaml").is_file()
            and all(path.name.startswith(_EARLY) for path in self._contents())
            and not any(self.checkpoints.glob("*.ckpt"))
        )

    def lock(self) -> None:
        """Keep other runs out for as long as this process lives, however it ends.

        Raises:
            UsageError: If another run is at work there, or the folder cannot be written to.
        """
        try:
            self._lock = lock_folder(self.path, "--run_dir")
        except FolderInUseError as error:
            raise UsageError(str(error)) from error

    def unlock(self) -> None:
        """Let others in; a folder in which there is nothing goes."""
        if self._lock is None:
            return
        if not self._contents() and not any(self.path.glob(f"{FAILED}*")):
            (self.path / LOCK).unlink(missing_ok=True)
            self.path.rmdir()
        self._lock.close()
        self._lock = None

    def prepare(self) -> None:
        """Remove what a kill left half-written, and put a run aside that ended before its first checkpoint."""
        for folder in (self.path, self.checkpoints, self.path / "backbone", self.path / "finetuned"):
            remove_parts(folder, everything=True)
        if not self._failed():
            return
        n = 1
        while (aside := self.path / f"{FAILED}{n}").exists():
            n += 1
        contents = self._contents()
        aside.mkdir()
        for path in contents:
            path.rename(aside / path.name)


def check_resumable(path: Path, method: LightningModule) -> None:
    """Check that a checkpoint is one of this method and size, with all that going on takes.

    Args:
        path: The checkpoint.
        method: The method that is to go on from it.

    Raises:
        CheckpointError: If it is not; says what is missing or different.
    """
    checkpoint = read_tensors(path)
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "epoch")
    if not isinstance(checkpoint, dict) or (absent := [part for part in parts if part not in checkpoint]):
        what = f"it has no {listing(absent)}" if isinstance(checkpoint, dict) else "it is no mapping"
        raise CheckpointError(
            f"{path} is no checkpoint of a training run: {what}. To start from its backbone, give it as "
            "--model.init_from instead of --ckpt_path."
        )
    state = checkpoint.get("current_model_state") or checkpoint["state_dict"]
    try:
        check_fit(method, state, str(path))
    except CheckpointError as error:
        if "not finite" in str(error):
            raise
        raise CheckpointError(
            f"{error} A run goes on with the method and options that it began with; to start another from this "
            "backbone, give it as --model.init_from instead of --ckpt_path."
        ) from None
    config = checkpoint.get(BACKBONE_CONFIG_KEY) or {}
    check_same_order(config.get("model_args") or {}, getattr(method, "backbone", None), str(path))
    trained = sum(p.requires_grad for p in method.parameters())
    found = [len(group["params"]) for state in checkpoint["optimizer_states"] for group in state["param_groups"]]
    if sum(found) != trained:
        raise CheckpointError(
            f"{path} holds an optimizer of {sum(found)} parameters, this run's has {trained}: go on with the options "
            "that the run began with."
        )
