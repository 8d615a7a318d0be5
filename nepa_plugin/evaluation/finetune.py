"""End-to-end fine-tuning as a protocol: what ``nepa finetune`` does, without a run folder."""

from dataclasses import dataclass
from typing import Any, ClassVar

from pytorch_lightning import Callback
from torch import nn

from nepa_plugin.data.evaluation import ImageFormat
from nepa_plugin.evaluation.images import Images, batch_per_process, ordered_loader, shuffled_loader
from nepa_plugin.evaluation.processes import Runtime, quiet
from nepa_plugin.finetuning import ClassifierModule, Recipe, Scores, classifier
from nepa_plugin.finetuning.cost import step_gflops
from nepa_plugin.methods.optimization import DivergenceError
from nepa_plugin.runtime.averaging import decay_of
from nepa_plugin.runtime.ranges import PositiveInt
from nepa_plugin.runtime.scoring import EvaluationDivergenceError, FiniteTraining
from nepa_plugin.runtime.step_seed import StepSeed


@dataclass
class FinetuneOptions(Recipe):
    __doc__ = f"""{(Recipe.__doc__ or "").rstrip()}
        epochs: Epochs.
        batch_size: Images per step over all devices, accumulation included.
        accumulate: Batches whose gradients are accumulated into one step.
    """

    prefix: ClassVar[str] = "finetune."

    epochs: PositiveInt = 100
    batch_size: PositiveInt = 1024
    accumulate: PositiveInt = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"finetune.accumulate {self.accumulate} does not divide finetune.batch_size {self.batch_size}."
            )


def finetune(
    model: Any,
    images: Images,
    form: ImageFormat,
    runtime: Runtime,
    options: FinetuneOptions,
    num_workers: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, float], nn.Module]:
    """Fine-tune a copy of a backbone on all devices, and score every validation image once.

    Args:
        model: A timm ViT that was built by name; it is left as it is.
        images: What to train on and to score.
        form: How the model takes images.
        runtime: Devices.
        options: The recipe.
        num_workers: Loader processes per device.
        seed: Of the order and the augmentation.

    Returns:
        ``top1`` and ``top5`` (or of all classes, where there are fewer) in per cent with ``ema_decay``, the decay that
        was in force, ``gflops`` per image of a step, and ``images_seen``; and the fine-tuned network. With
        ``select="best"``, ``top1`` is that of the best epoch, with ``best_epoch`` and ``last_top1`` in place of
        ``top5``.

    Raises:
        EvaluationDivergenceError: If a loss, a weight or a prediction is not finite.
    """
    batch = batch_per_process(options.batch_size, len(images.train), runtime.world_size) // options.accumulate
    batch = max(2, batch - batch % 2)  # Mixup pairs images
    with quiet(seed):
        network: Any = classifier(model, images.classes, options)
        module = ClassifierModule(network, options, batch)
        rates = "--finetune.lr and --finetune.head_lr"
        scores = Scores(keep_best=options.select == "best")
        callbacks: list[Callback] = [StepSeed(seed), FiniteTraining(rates), scores]
        trainer = runtime.trainer(
            options.epochs,
            callbacks,
            accumulate_grad_batches=options.accumulate,
            check_val_every_n_epoch=1 if scores.keep_best else options.epochs,
        )
        train = shuffled_loader(images.train, module.train_transform(), runtime, batch, seed, trainer, num_workers)
        val = ordered_loader(images.val, form.evaluation(), runtime, batch, num_workers)
        try:
            trainer.fit(module, train, val)
        except DivergenceError as error:
            raise EvaluationDivergenceError(f"Training has diverged: {error.found}. Lower {rates}.") from error
        if scores.keep_best:
            network.load_state_dict(scores.best_state)
        cost = {"gflops": step_gflops(network), "images_seen": trainer.global_step * module.global_batch_size}
        return scores.final() | {"ema_decay": decay_of(trainer)} | cost, network.eval()
