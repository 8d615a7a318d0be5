"""``metrics.csv``: a row per step that was logged, which neither a kill nor a restart loses or doubles."""

import csv
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from nepa_plugin.runtime.files import whole_file

Row = dict[str, Any]


class MetricsFile(ExperimentWriter):
    """Lightning's writer, except that what is in the file stays, and that it is replaced only by a whole one.

    Args:
        folder: Where ``metrics.csv`` is, or will be.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.path = Path(self.metrics_file_path)
        if self.path.is_file():
            rows = self._read()
            self._replace(rows)  # without a last line that a kill has cut

    def _check_log_dir_exists(self) -> None:
        """Do nothing: Lightning deletes the file here."""

    def _read(self) -> list[Row]:
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if None not in row.values() and None not in row and row.get("step")]
        self.metrics_keys = list(reader.fieldnames or [])
        return rows

    def _replace(self, rows: list[Row]) -> None:
        with whole_file(self.path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Add columns; a file that was begun is never half."""
        rows = self._read()
        self.metrics_keys = list(fieldnames)
        self._replace(rows)

    def keep_before(self, step: int) -> None:
        """Drop the rows of a step and all after it, which are going to be trained again."""
        if self.path.is_file():
            self._replace([row for row in self._read() if int(row["step"]) < step])


class KeepingCSVLogger(CSVLogger):
    """Lightning's ``CSVLogger``, except that a file from before the restart is continued instead of deleted.

    Args:
        folder: Where ``metrics.csv`` goes; it is written after every row.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(str(folder), name="", version="", flush_logs_every_n_steps=1)

    @property
    def experiment(self) -> Any:
        """The writer; process zero's alone is used."""
        if self._experiment is None and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            self._experiment = MetricsFile(self.log_dir)
        return self._experiment if self._experiment is not None else super().experiment


class KeptMetrics(Callback):
    """When a run is resumed, drop the logged rows of steps after its checkpoint: they come again."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Drop them."""
        if trainer.ckpt_path is None or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, KeepingCSVLogger):
                logger.experiment.keep_before(trainer.global_step)
