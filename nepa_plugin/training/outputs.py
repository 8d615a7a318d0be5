"""What a finished run leaves behind: the backbone, the curves, and a summary."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from nepa_plugin.checkpoints import backbone_config, load_backbone, save_backbone
from nepa_plugin.methods.cost import TrainingCost
from nepa_plugin.runtime.files import write_json
from nepa_plugin.runtime.provenance import provenance
from nepa_plugin.training.callbacks import RunClock
from nepa_plugin.training.curves import plot_training


def write_outputs(run_dir: Path, summary: dict[str, Any]) -> None:
    """Export the backbone of a run's last checkpoint, draw its curves and write its summary.

    Args:
        run_dir: The run folder.
        summary: What :func:`run_summary` returns.
    """
    last = run_dir / "checkpoints" / "last.ckpt"
    if not last.is_file():  # fast_dev_run, or no step taken
        return
    # From the checkpoint, not from the module: there the averaged weights are under a fixed name.
    save_backbone(load_backbone(last), run_dir / "backbone", overwrite=True)
    if (run_dir / "metrics.csv").is_file():  # a run shorter than log_every_n_steps has logged nothing
        plot_training(run_dir / "metrics.csv", run_dir / "loss.png")
    write_json(run_dir / "summary.json", summary)
    rank_zero_info(
        f"Backbone: {run_dir / 'backbone'}   curves: {run_dir / 'loss.png'}   numbers: {run_dir / 'metrics.csv'}"
    )


def run_summary(trainer: Trainer, name: str, clock: RunClock, cost: TrainingCost, seed: int | None) -> dict[str, Any]:
    """Return what a comparison of runs reads, and what it takes to repeat this one.

    Args:
        trainer: The trainer after ``fit``, with its method and data module.
        name: The method's class; sharding replaces it.
        clock: What the run took.
        cost: What a step costs.
        seed: ``seed_everything``.

    Returns:
        A mapping that JSON can hold.
    """
    method: Any = trainer.lightning_module
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return {
        "method": name,
        "seed": seed,
        **data.training_data(),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "global_batch_size": method.global_batch_size,
        "images_seen": clock.images,
        "seconds": clock.seconds,
        "images_per_second": clock.images / clock.seconds if clock.seconds else None,
        "peak_memory_bytes": clock.peak_bytes,
        "devices": f"{trainer.world_size} x {trainer.strategy.root_device.type}",
        "precision": str(trainer.precision),
        "backbone": backbone_config(method.backbone),
        "backbone_class": type(method.backbone).__name__,
        "attention": method.attention,
        "exported": "moving average" if method.averaged else method.exported,
        **asdict(cost),
        **provenance(),
    }
