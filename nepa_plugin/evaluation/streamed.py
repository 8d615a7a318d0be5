"""The readout of more images than memory has room for: no training feature is kept.

kNN meets the training images batch by batch, and the linear probes of all depths and poolings train side by side on one
pass of the backbone, as in DINOv2's linear evaluation (Oquab et al. 2023, appendix), which also tries several learning
rates at once.
"""

from collections import deque
from collections.abc import Iterable
from itertools import product
from typing import Any

import torch
from lightly.utils.scheduler import CosineWarmupScheduler
from pytorch_lightning import LightningModule
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.optim import SGD
from torchmetrics import Metric

from nepa_plugin.data.evaluation import ImageFormat
from nepa_plugin.evaluation.features import (
    autocast,
    depth_names,
    extract_depth_features,
    frozen,
    gather_features,
    pool_names,
    pool_states,
    token_states,
)
from nepa_plugin.evaluation.images import Images, batch_per_process, ordered_loader, shuffled_loader
from nepa_plugin.evaluation.knn import NearestNeighbours, check_labels, unit
from nepa_plugin.evaluation.linear import LinearOptions
from nepa_plugin.evaluation.options import EvaluationOptions
from nepa_plugin.evaluation.processes import Runtime, quiet
from nepa_plugin.evaluation.readout import FOLDS, ReadoutRow, hold_out
from nepa_plugin.runtime.scoring import diverged

Pair = tuple[str, str]  # depth and pooling

#: Learning rates that every probe is trained with, as parts of ``linear.lr``.
LR_FACTORS = (0.03, 0.1, 0.3, 1.0)


def streamed_readout(
    model: Any, images: Images, form: ImageFormat, runtime: Runtime, options: EvaluationOptions
) -> list[ReadoutRow]:
    """Score every depth and pooling of a frozen backbone without keeping features of the training images.

    Args:
        model: The backbone; its weights are not changed.
        images: What to fit on and to score.
        form: How the model takes images.
        runtime: Devices; every process calls this.
        options: kNN's, the probes' and ``concat``.

    Returns:
        A row per depth and pooling, ``concat`` among them, in every process.
    """
    knn = _knn(model, images, form, runtime, options)
    linear = _linear(model, images, form, runtime, options)
    chosen = _held_out(model, images, form, runtime, options)
    return [
        ReadoutRow(*pair, knn[pair], linear[pair], chosen[pair] if chosen is not None else None)
        for pair in _pairs(model)
    ]


def _held_out(
    model: Any, images: Images, form: ImageFormat, runtime: Runtime, options: EvaluationOptions
) -> dict[Pair, float] | None:
    """Return each pair's accuracy on training images that its probe was not trained on; nothing if a class has few.

    A part of the training images is enough to say which depth is best: at most ``logistic_limit`` of four fifths of
    them to train on, and as many per class as there are of the other fifth to score, in proportion.
    """
    held = hold_out(torch.tensor(images.train.dataset.targets))
    if held is None:
        return None
    used = _spread(~held, options.linear.logistic_limit), _spread(held, options.linear.logistic_limit // FOLDS)
    if min(map(len, used)) < runtime.world_size:
        return None
    return _linear(model, images, form, runtime, options, used)


def _spread(mask: Tensor, limit: int) -> list[int]:
    """Return the places (N,) where a mask is set, or, if these are more than ``limit``, so many evenly among them."""
    places = mask.nonzero().flatten()
    if len(places) > max(1, limit):
        places = places[torch.linspace(0, len(places) - 1, max(1, limit)).long()]
    return [int(place) for place in places]


def _pairs(model: Any) -> list[Pair]:
    return list(product(depth_names(model), [*pool_names(model), "concat"]))


def _knn(
    model: Any, images: Images, form: ImageFormat, runtime: Runtime, options: EvaluationOptions
) -> dict[Pair, float]:
    loader = {
        split: ordered_loader(images.split(split), form.evaluation(), runtime, options.batch_size, options.num_workers)
        for split in ("train", "val")
    }
    pairs = [pair for pair in _pairs(model) if pair[1] != "concat"]
    count, device = len(images.val), runtime.device
    own = len(range(runtime.rank, count, runtime.world_size))
    share = extract_depth_features(model, loader["val"], device, pairs, own, runtime.precision)
    val = gather_features(share, count, device, everywhere=True)
    assert val is not None  # everywhere
    num_classes = check_labels(torch.tensor(images.train.dataset.targets), val.labels)
    queries = {(depth, pool): unit(val.features[depth][pool], device) for depth, pool in pairs}
    labels = val.labels.to(device)
    del share, val
    nearest = {pair: NearestNeighbours(count, options.k, device) for pair in _pairs(model)}
    batches: Iterable[Any] = loader["train"]
    if runtime.progress:
        batches = track(batches, "neighbours at every depth")
    with torch.no_grad(), frozen(model), token_states(model, depth_names(model)) as states:
        for batch, targets, *_ in batches:
            with autocast(device, runtime.precision):
                model.forward_features(batch.to(device, non_blocking=True))
            targets = targets.to(device, non_blocking=True)
            means: deque[Tensor] = deque(maxlen=options.concat)
            for pair, features in pool_states(model, states, pairs).items():
                similarity = queries[pair] @ unit(features, device).t()
                nearest[pair].add(similarity, targets)
                if pair[1] == "mean":
                    means.append(similarity)
                    # parts of length one, side by side: their cosine is the mean of the parts' cosines
                    nearest[pair[0], "concat"].add(torch.stack(list(means)).mean(dim=0), targets)
    scores = {}
    for pair, mine in nearest.items():
        hits = (mine.gather().predict(num_classes, options.temperature) == labels).sum()
        scores[pair] = 100 * int(hits) / count
    return scores


def _linear(
    model: Any,
    images: Images,
    form: ImageFormat,
    runtime: Runtime,
    options: EvaluationOptions,
    used: tuple[list[int], list[int]] | None = None,
) -> dict[Pair, float]:
    """Return each pair's accuracy: trained on all training images and scored on the validation images.

    With ``used``, it is trained and scored on these two parts of the training images.
    """
    recipe, (fit, score) = options.linear, used or (None, None)
    scored = images.val if used is None else images.train
    batch = batch_per_process(recipe.batch_size, len(images.train if fit is None else fit), runtime.world_size)
    with quiet(options.seed), frozen(model):
        probes = DepthProbes(PooledDepths(model, options.concat), batch, len(images.classes), recipe)
        trainer = runtime.trainer(recipe.readout_epochs)
        transform = form.random_crop(recipe.crop_scale, recipe.hflip_prob)
        train = shuffled_loader(
            images.train, transform, runtime, batch, options.seed, trainer, options.num_workers, fit
        )
        val = ordered_loader(scored, form.evaluation(), runtime, batch, options.num_workers, score)
        trainer.fit(probes, train, val)
        return probes.best()


class PooledDepths(nn.Module):
    """A frozen backbone as a module from images to its features at every depth.

    Args:
        model: The backbone; its weights are shared, and never changed.
        concat: Number of depths that are put side by side.

    Attributes:
        pairs: Depths and poolings.
        depths: Depths, for those side by side.
        width: Channels of a token.
    """

    def __init__(self, model: nn.Module, concat: int) -> None:
        super().__init__()
        self.backbone: Any = model
        self.concat = concat
        self.depths = depth_names(model)
        self.pairs = [pair for pair in _pairs(model) if pair[1] != "concat"]
        self.width: int = self.backbone.num_features  # type: ignore[assignment]

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of the pairs (B, pairs, D), and those side by side (B, depths, concat * D).

        Where there are fewer depths to put side by side, zeros take the place of the others.
        """
        with token_states(self.backbone, self.depths) as states:
            self.backbone.forward_features(images)
        pooled = pool_states(self.backbone, states, self.pairs)
        means = torch.stack([normalize(pooled[depth, "mean"], dim=1) for depth in self.depths], dim=1)
        beside = torch.cat([means.new_zeros(len(means), self.concat - 1, self.width), means], dim=1)
        windows = beside.unfold(1, self.concat, 1).transpose(2, 3)  # (B, depths, concat, D)
        return torch.stack(list(pooled.values()), dim=1), windows.flatten(2)


class _Probes(nn.Module):
    """Linear classifiers of standardised inputs (B, P, W), one per input and learning rate, from zero."""

    def __init__(self, inputs: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(inputs * width, affine=False)
        shape = inputs, width, num_classes
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for _ in LR_FACTORS)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(inputs, 1, num_classes)) for _ in LR_FACTORS)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (learning rates, P, B, classes)."""
        inputs = self.norm(features.flatten(1)).view_as(features).transpose(0, 1)
        logits = [torch.bmm(inputs, weight) + bias for weight, bias in zip(self.weights, self.biases, strict=True)]
        return torch.stack(logits)


class _Sums(Metric):
    """Sums over images and processes, one per learning rate and place."""

    total: Tensor

    def __init__(self, places: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(len(LR_FACTORS), places, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add values (learning rates, places, B)."""
        self.total += values.sum(dim=-1)

    def compute(self) -> Tensor:
        """Return the sums."""
        return self.total


class DepthProbes(LightningModule):
    """Linear probes of every depth and pooling, each with several learning rates, on one pass of the backbone.

    The features are standardised by a BatchNorm without parameters: their scale differs by depth. No probe's loss
    reaches another's weights, so training them together is training each of them alone.

    Args:
        pooled: The frozen features.
        batch_size_per_device: Images per device and step; scales the learning rates.
        num_classes: Number of classes.
        options: The recipe.
    """

    def __init__(
        self, pooled: PooledDepths, batch_size_per_device: int, num_classes: int, options: LinearOptions
    ) -> None:
        super().__init__()
        self.pooled = pooled
        self.images_per_device = batch_size_per_device
        self.options = options
        self.pairs = [*pooled.pairs, *((depth, "concat") for depth in pooled.depths)]
        self.single = _Probes(len(pooled.pairs), pooled.width, num_classes)
        self.beside = _Probes(len(pooled.depths), pooled.concat * pooled.width, num_classes)
        self.losses, self.hits, self.scored = (_Sums(len(self.pairs)) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (learning rates, pairs, B, classes)."""
        pairs, beside = self.pooled(images)
        return torch.cat([self.single(pairs), self.beside(beside)], dim=1)

    def on_train_epoch_start(self) -> None:
        """Add up the losses of this epoch alone."""
        self.pooled.eval()
        self.losses.reset()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum over all probes of the mean cross-entropy."""
        logits = self(batch[0]).float()
        targets = batch[1].expand(logits.shape[:-1])
        losses = cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view(targets.shape)
        self.losses.update(losses.detach())
        return losses.mean(dim=-1).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Count hits."""
        logits = self(batch[0])
        self.hits.update(logits.argmax(dim=-1) == batch[1])
        self.scored.update(torch.ones_like(logits[..., 0]))

    def configure_optimizers(self) -> Any:
        """Return SGD with a group per learning rate, and cosine to zero over all steps."""
        peak = self.options.lr * self.images_per_device * self.trainer.world_size / 256
        groups = [
            {
                "params": [probes.weights[i] for probes in both] + [probes.biases[i] for probes in both],
                "lr": factor * peak,
            }
            for both in [(self.single, self.beside)]
            for i, factor in enumerate(LR_FACTORS)
        ]
        optimizer = SGD(groups, momentum=self.options.momentum, weight_decay=self.options.weight_decay)
        schedule = CosineWarmupScheduler(optimizer, 0, int(self.trainer.estimated_stepping_batches), end_value=0.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def best(self) -> dict[Pair, float]:
        """Return the accuracy in per cent of every pair, with the learning rate of the lowest training loss.

        Raises:
            EvaluationDivergenceError: If no learning rate of a pair has a finite loss.
        """
        tops = 100 * self.hits.compute() / self.scored.compute()
        lowest, chosen = self.losses.compute().nan_to_num(torch.inf).min(dim=0, keepdim=True)
        if not lowest.isfinite().all():
            raise diverged(f"the loss of the linear probe at {self.pairs[int(lowest.argmax())]}", "--linear.lr")
        return dict(zip(self.pairs, tops.gather(0, chosen)[0].tolist(), strict=True))
