"""Attention-pooling probe: a light readout over the token sequence of a frozen backbone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightly.utils.scheduler import CosineWarmupScheduler
from pytorch_lightning import LightningModule
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from nepa_plugin.data.evaluation import ImageFormat
from nepa_plugin.evaluation.features import FrozenFeatures, frozen
from nepa_plugin.evaluation.images import Images, batch_per_process, ordered_loader, shuffled_loader
from nepa_plugin.evaluation.processes import Runtime, quiet
from nepa_plugin.runtime.ranges import (
    Fraction,
    NonNegativeFloat,
    PositiveInt,
    PositiveLearningRate,
    Scale,
    check_ranges,
)
from nepa_plugin.runtime.scoring import FiniteTraining, accuracies, score, scores


@dataclass
class AttentiveOptions:
    """How the attentive probe is trained.

    Args:
        depth: Depth whose tokens are read; ``None`` takes that of the other probes.
        num_heads: Attention heads; by default one per 16 channels up to 512 channels, one per 64 above.
        position_embedding: Add a learned position embedding to the tokens. Backbones with rotary positions, NEPA's
            among them, use positions in attention only. On few images it helps with ``augment`` only.
        mlp: Follow the attention with the residual MLP of V-JEPA's probe; AIM's has none.
        epochs: Epochs.
        batch_size: Images per step over all devices.
        lr: Learning rate of AdamW, as it is.
        weight_decay: AdamW weight decay of matrices.
        warmup_fraction: Linear warm-up as a fraction of all steps; then cosine to zero.
        augment: Train on augmented images, which run through the backbone in every epoch, instead of cached tokens.
        crop_scale: Augmentation: range of the random crop's area as a fraction of the image.
        hflip_prob: Augmentation: probability of a horizontal flip.
        max_token_gb: Without augmentation, tokens of up to so many GB are computed once and kept; above, and on several
            devices, the images run through the backbone in every epoch.
    """

    depth: str | None = None
    num_heads: PositiveInt | None = None
    position_embedding: bool = False
    mlp: bool = True
    epochs: PositiveInt = 30
    batch_size: PositiveInt = 128
    lr: PositiveLearningRate = 1e-3
    weight_decay: NonNegativeFloat = 0.05
    warmup_fraction: Fraction = 0.1
    augment: bool = False
    crop_scale: Scale = (0.3, 1.0)
    hflip_prob: Fraction = 0.5
    max_token_gb: NonNegativeFloat = 1.0

    def __post_init__(self) -> None:
        check_ranges(type(self), vars(self), "attentive.")


class AttentivePool(nn.Module):
    """A learned query that attends to the tokens, then a linear classifier.

    Sources: AIM (El-Nouby et al. 2024, section 3: batch-normalised tokens, cross-attention with a learned query),
    V-JEPA (Bardes et al. 2024, appendix: the same with a residual MLP). The layers are timm's.

    Args:
        embed_dim: Token dimension D.
        num_tokens: Sequence length T.
        num_classes: Number of classes.
        options: Size of the probe.

    Raises:
        ValueError: If the heads do not divide the channels.
    """

    def __init__(self, embed_dim: int, num_tokens: int, num_classes: int, options: AttentiveOptions) -> None:
        super().__init__()
        heads = options.num_heads or max(1, embed_dim // (16 if embed_dim <= 512 else 64))
        if embed_dim % heads:
            raise ValueError(f"attentive.num_heads: {heads} heads do not divide {embed_dim} channels.")
        self.token_norm = nn.BatchNorm1d(embed_dim, affine=False)
        self.pool = AttentionPoolLatent(
            embed_dim,
            out_features=embed_dim if options.mlp else 0,
            num_heads=heads,
            norm_layer=nn.LayerNorm,
            pos_embed="abs" if options.position_embedding else "",
            feat_size=num_tokens,
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, num_classes) of tokens (B, T, D)."""
        tokens = self.token_norm(tokens.transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm(self.pool(tokens)))


class AttentiveProbe(LightningModule):
    """Trains an :class:`AttentivePool` and scores it.

    Args:
        tokens: A frozen module from a batch's first element to tokens (B, T, D).
        pool: The probe.
        num_classes: Number of classes.
        options: The recipe.
    """

    def __init__(self, tokens: nn.Module, pool: nn.Module, num_classes: int, options: AttentiveOptions) -> None:
        super().__init__()
        self.tokens = tokens
        self.pool = pool
        self.options = options
        self.loss = nn.CrossEntropyLoss()
        self.accuracy = accuracies(num_classes)

    def on_train_epoch_start(self) -> None:
        """Keep the backbone in evaluation mode."""
        self.tokens.eval()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch of (images or tokens, labels)."""
        return self.loss(self.pool(self.tokens(batch[0])), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Count a batch's hits; torchmetrics adds the counts of all devices."""
        score(self, self.accuracy, self.pool(self.tokens(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        """Return AdamW with weight decay of matrices only, and warm-up then cosine to zero."""
        matrices = [p for p in self.pool.parameters() if p.ndim == 2]
        others = [p for p in self.pool.parameters() if p.ndim != 2]  # vectors, the query and the position embedding
        decay = self.options.weight_decay
        groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = AdamW(groups, lr=self.options.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = min(round(self.options.warmup_fraction * steps), steps // 2)
        scheduler = CosineWarmupScheduler(optimizer, warmup_epochs=warmup, max_epochs=steps, end_value=0.0)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class TokenSet(NamedTuple):
    """Cached tokens (N, T, D) and labels (N,)."""

    tokens: Tensor
    labels: Tensor


class _Batches(torch.utils.data.Sampler[Tensor]):
    """Batches of indices, shuffled anew in every epoch where a seed is given."""

    def __init__(self, count: int, size: int, seed: int | None = None) -> None:
        self.count = count
        self.size = size
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.count // self.size if self.generator else -(-self.count // self.size)

    def __iter__(self) -> Iterator[Tensor]:
        if self.generator is None:
            yield from torch.arange(self.count).split(self.size)
        else:
            yield from torch.randperm(self.count, generator=self.generator).split(self.size)[: len(self)]


def _token_loader(data: TokenSet, batch_size: int, seed: int | None = None) -> DataLoader[Any]:
    sampler = _Batches(len(data.labels), batch_size, seed)
    return DataLoader(TensorDataset(data.tokens, data.labels), sampler=sampler, batch_size=None)


def attentive_probe_tokens(
    train: TokenSet, val: TokenSet, num_classes: int, runtime: Runtime, options: AttentiveOptions, seed: int = 0
) -> dict[str, float]:
    """Train the attentive probe on cached tokens, on one device.

    Args:
        train: Tokens to fit on.
        val: Tokens to score.
        num_classes: Number of classes.
        runtime: The device.
        options: The recipe.
        seed: Of the probe and the order.

    Returns:
        ``top1`` and ``top5`` (or of all classes, where there are fewer) in per cent.
    """
    batch = batch_per_process(options.batch_size, len(train.labels), 1)
    with quiet(seed):
        pool = AttentivePool(train.tokens.shape[2], train.tokens.shape[1], num_classes, options)
        probe = AttentiveProbe(nn.Identity(), pool, num_classes, options)
        trainer = runtime.trainer(options.epochs, [FiniteTraining("--attentive.lr")])
        trainer.fit(probe, _token_loader(train, batch, seed), _token_loader(val, 512))
        return scores(trainer, "--attentive.lr")


def attentive_probe(
    model: Any,
    images: Images,
    form: ImageFormat,
    runtime: Runtime,
    options: AttentiveOptions,
    depth: str = "final norm",
    num_workers: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Train the attentive probe on images that run through the frozen backbone, on all devices.

    Args:
        model: The backbone; its weights are not changed.
        images: What to fit on and to score.
        form: How the model takes images.
        runtime: Devices.
        options: The recipe.
        depth: Depth whose tokens are read.
        num_workers: Loader processes per device.
        seed: Of the probe, the order and the augmentation.

    Returns:
        ``top1`` and ``top5`` (or of all classes, where there are fewer) in per cent.
    """
    batch = batch_per_process(options.batch_size, len(images.train), runtime.world_size)
    num_classes = len(images.classes)
    transform = form.random_crop(options.crop_scale, options.hflip_prob) if options.augment else form.evaluation()
    with quiet(seed), frozen(model):
        tokens = FrozenFeatures(model, depth, pool=None)
        shape = tokens(torch.zeros(1, 3, *form.size, device=next(model.parameters()).device)).shape
        pool = AttentivePool(shape[2], shape[1], num_classes, options)
        probe = AttentiveProbe(tokens, pool, num_classes, options)
        trainer = runtime.trainer(options.epochs, [FiniteTraining("--attentive.lr")])
        train = shuffled_loader(images.train, transform, runtime, batch, seed, trainer, num_workers)
        val = ordered_loader(images.val, form.evaluation(), runtime, batch, num_workers)
        trainer.fit(probe, train, val)
        return scores(trainer, "--attentive.lr")
