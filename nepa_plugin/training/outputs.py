"""What a finished run leaves behind: the backbone or classifier, the curves, and a summary."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from nepa_plugin.checkpoints import backbone_config, load_backbone, save_backbone
from nepa_plugin.finetuning import Scores
from nepa_plugin.finetuning.cost import step_gflops
from nepa_plugin.methods.cost import TrainingCost
from nepa_plugin.runtime.averaging import decay_of, first_weights
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
    return {
        "method": name,
        **_of_any_run(trainer, clock, seed),
        "backbone": backbone_config(method.backbone),
        "backbone_class": type(method.backbone).__name__,
        "attention": method.attention,
        "exported": "moving average" if method.averaged else method.exported,
        "ema_decay": decay_of(trainer),
        "first_weights": max(
            method.first_weights(trainer.global_step), first_weights(decay_of(trainer), trainer.global_step)
        ),
        **asdict(cost),
        **provenance(),
    }


def _of_any_run(trainer: Trainer, clock: RunClock, seed: int | None) -> dict[str, Any]:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return {
        "seed": seed,
        **data.training_data(),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "global_batch_size": trainer.lightning_module.global_batch_size,
        "images_seen": clock.images,
        "seconds": clock.seconds,
        "images_per_second": clock.images / clock.seconds if clock.seconds else None,
        "peak_memory_bytes": clock.peak_bytes,
        "devices": f"{trainer.world_size} x {trainer.strategy.root_device.type}",
        "precision": str(trainer.precision),
    }


def write_classifier(run_dir: Path, scores: Scores, summary: dict[str, Any]) -> None:
    """Export the classifier of a fine-tuning, draw its curves and write its summary.

    Args:
        run_dir: The run folder.
        scores: What its validations found; with ``keep_best``, the best network is exported.
        summary: What :func:`finetuning_summary` returns.
    """
    last, folder = run_dir / "checkpoints" / "last.ckpt", run_dir / "finetuned"
    if not last.is_file():  # fast_dev_run, or no step taken
        return
    network = load_backbone(last)  # of the checkpoint, where the averaged weights are under a fixed name
    if scores.keep_best and scores.best_state:
        network.load_state_dict(scores.best_state)
    save_backbone(network, folder, overwrite=True)
    if (run_dir / "metrics.csv").is_file():
        plot_training(run_dir / "metrics.csv", run_dir / "loss.png")
    write_json(run_dir / "summary.json", summary)
    found = f"top-1 {summary['top1']:.2f} %" if "top1" in summary else "no validation images, no score"
    if "best_epoch" in summary:
        found += (
            f" in epoch {summary['best_epoch']} of {summary['epochs']}, the best; {summary['last_top1']:.2f} % last"
        )
    rank_zero_info(f"Classifier: {folder} ({found})   numbers: {run_dir / 'summary.json'}, {run_dir / 'metrics.csv'}")


def finetuning_summary(trainer: Trainer, scores: Scores, clock: RunClock, seed: int | None) -> dict[str, Any]:
    """Return what a fine-tuning reached, in per cent, and what it takes to repeat it, as :func:`run_summary`."""
    module: Any = trainer.lightning_module
    return {
        "method": "fine-tuning",
        **scores.final(),
        "ema_decay": decay_of(trainer),
        "init_from": module.hparams.get("init_from"),
        "gflops": step_gflops(module.network),
        **_of_any_run(trainer, clock, seed),
        "recipe": asdict(module.recipe),
        "network": backbone_config(module.network),
        "attention": str(getattr(module.network, "attention", "bidirectional")),
        **provenance(),
    }
