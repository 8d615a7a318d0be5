"""Linear probe: lightly's classifier with the ImageNet recipe, or logistic regression on cached features."""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

from lightly.utils.benchmarking import LinearClassifier
from torch import Tensor, nn

from nepa_plugin.data.evaluation import ImageFormat
from nepa_plugin.evaluation.features import FrozenFeatures, frozen
from nepa_plugin.evaluation.images import Images, batch_per_process, ordered_loader, shuffled_loader
from nepa_plugin.evaluation.knn import check_labels
from nepa_plugin.evaluation.processes import Runtime, quiet
from nepa_plugin.runtime.ranges import (
    Fraction,
    FractionBelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveLearningRate,
    Scale,
    check_ranges,
)
from nepa_plugin.runtime.scoring import FiniteTraining, accuracies, score, scores

#: Numbers of features times classes up to which logistic regression has one BLAS thread. Its many small products wait
#: for the threads of several libraries that spin beside each other: on two cores, the readout of the digits took more
#: than 200 s, and 23 with one. From about 3e9 on, two threads were faster.
SMALL = 1_000_000_000


@dataclass
class LinearOptions:
    """How the linear probe is trained.

    The defaults of ``sgd`` are the usual ImageNet recipe, as in MoCo and SimCLR: SGD with momentum, no weight decay,
    lightly's cosine to a thousandth, random resized crops and flips.

    Args:
        solver: ``"sgd"`` (lightly's classifier on augmented images), ``"logistic"`` (scikit-learn on cached features),
            or ``"auto"``: logistic up to ``logistic_limit`` training images.
        logistic_limit: Largest number of training images for which ``auto`` takes logistic regression.
        C: Inverse strength of logistic regression's L2 penalty.
        epochs: Epochs of SGD.
        readout_epochs: Epochs of SGD for the readout, whose probes share them; DINOv2's number.
        lr: Learning rate per 256 images.
        momentum: Of SGD.
        weight_decay: Of SGD.
        batch_size: Images per step over all devices.
        crop_scale: Range of the random crop's area as a fraction of the image.
        hflip_prob: Probability of a horizontal flip.
        batch_norm: Put a BatchNorm without affine parameters before the linear layer, as MAE does.
    """

    solver: Literal["auto", "sgd", "logistic"] = "auto"
    logistic_limit: NonNegativeInt = 50_000
    C: PositiveFloat = 1.0
    epochs: PositiveInt = 90
    readout_epochs: PositiveInt = 10
    lr: PositiveLearningRate = 0.1
    momentum: FractionBelowOne = 0.9
    weight_decay: NonNegativeFloat = 0.0
    batch_size: PositiveInt = 256
    crop_scale: Scale = (0.08, 1.0)
    hflip_prob: Fraction = 0.5
    batch_norm: bool = False

    def __post_init__(self) -> None:
        check_ranges(type(self), vars(self), "linear.")
        if self.solver not in ("auto", "sgd", "logistic"):
            raise ValueError(f"linear.solver must be auto, sgd or logistic, got {self.solver!r}.")

    def choose(self, num_images: int) -> Literal["sgd", "logistic"]:
        """Return the solver for so many training images."""
        if self.solver != "auto":
            return self.solver
        return "logistic" if num_images <= self.logistic_limit else "sgd"


def logistic_probe(
    train_features: Tensor, train_labels: Tensor, val_features: Tensor, val_labels: Tensor, C: float = 1.0
) -> float:
    """Return the top-1 accuracy of scikit-learn's logistic regression on standardised features.

    Args:
        train_features: (N, D).
        train_labels: (N,).
        val_features: (M, D).
        val_labels: (M,).
        C: Inverse strength of the L2 penalty.

    Returns:
        Per cent.

    Raises:
        ValueError: If the labels cannot be scored.
    """
    check_labels(train_labels, val_labels)
    # a tenth of a command's start, pandas with it, and most commands have no use for it
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000))
    small = train_features.numel() * int(train_labels.max() + 1) <= SMALL
    with warnings.catch_warnings(), threadpool_limits(1 if small else None, user_api="blas"):
        # features of an untrained network are nearly collinear; the accuracy has settled long before the weights
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(train_features.numpy(), train_labels.numpy())
    return 100 * float(probe.score(val_features.numpy(), val_labels.numpy()))


class LinearProbe(LinearClassifier):
    """lightly's ``LinearClassifier`` with its fixed settings as options.

    Args:
        model: A frozen module from images to features (B, D).
        batch_size_per_device: Images per device and step; scales the learning rate.
        feature_dim: D.
        num_classes: Number of classes.
        options: The recipe.
    """

    def __init__(
        self, model: nn.Module, batch_size_per_device: int, feature_dim: int, num_classes: int, options: LinearOptions
    ) -> None:
        super().__init__(
            model, batch_size_per_device, options.lr, feature_dim, num_classes, topk=(1, min(5, num_classes))
        )
        self.options = options
        self.accuracy = accuracies(num_classes)
        if options.batch_norm:
            norm = nn.BatchNorm1d(feature_dim, affine=False)
            self.classification_head = nn.Sequential(norm, nn.Linear(feature_dim, num_classes))

    def validation_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        """Count a batch's hits instead of averaging the batches' accuracies."""
        score(self, self.accuracy, self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """Return lightly's optimizer and cosine, with this recipe's momentum and weight decay."""
        optimizers, schedulers = super().configure_optimizers()
        for group in optimizers[0].param_groups:
            group |= {"momentum": self.options.momentum, "weight_decay": self.options.weight_decay}
        return optimizers, schedulers


def linear_probe(
    model: Any,
    images: Images,
    form: ImageFormat,
    runtime: Runtime,
    options: LinearOptions,
    depth: str = "final norm",
    pool: str = "mean",
    num_workers: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Train lightly's linear classifier on a frozen backbone, on all devices, and score every validation image once.

    Args:
        model: The backbone; its weights are not changed.
        images: What to fit on and to score.
        form: How the model takes images.
        runtime: Devices.
        options: The recipe.
        depth: Depth whose tokens are read.
        pool: How they are pooled.
        num_workers: Loader processes per device.
        seed: Of the classifier, the order and the augmentation.

    Returns:
        ``top1`` and ``top5`` (or of all classes, where there are fewer) in per cent.
    """
    batch = batch_per_process(options.batch_size, len(images.train), runtime.world_size)
    with quiet(seed), frozen(model):
        probe = LinearProbe(FrozenFeatures(model, depth, pool), batch, model.num_features, len(images.classes), options)
        trainer = runtime.trainer(options.epochs, [FiniteTraining("--linear.lr")])
        transform = form.random_crop(options.crop_scale, options.hflip_prob)
        train = shuffled_loader(images.train, transform, runtime, batch, seed, trainer, num_workers)
        val = ordered_loader(images.val, form.evaluation(), runtime, batch, num_workers)
        trainer.fit(probe, train, val)
        return scores(trainer, "--linear.lr")
