"""End-to-end fine-tuning with the published recipe."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import timm
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback
from timm.data import Mixup, create_transform
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from nepa_plugin.checkpoints import backbone_config, name_classes
from nepa_plugin.evaluation.images import ImageFormat, Images, batch_per_process, ordered_loader, shuffled_loader
from nepa_plugin.evaluation.processes import Runtime, quiet
from nepa_plugin.evaluation.scoring import FiniteTraining, accuracies, score, scores
from nepa_plugin.predictor import NepaViT
from nepa_plugin.runtime.averaging import FusedEMA
from nepa_plugin.runtime.ranges import (
    Fraction,
    FractionBelowOne,
    NonNegativeFloat,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    PositiveLearningRate,
    Scale,
    check_ranges,
)


@dataclass
class FinetuneOptions:
    """How a network is fine-tuned; the defaults are the published recipe of ViT-B (arXiv 2512.16922, appendix).

    Args:
        epochs: Epochs.
        batch_size: Images per step over all devices, accumulation included.
        accumulate: Batches whose gradients are accumulated into one step.
        lr: Learning rate of the last block, per 256 images.
        head_lr: Learning rate of the final norm and the head, as it is; ``None`` takes that of the last block.
        layer_decay: Block i of L trains with lr * layer_decay^(L - 1 - i), what comes before it as block -1, and the
            norm between pooling and head as the last block.
        weight_decay: AdamW weight decay of what has more than one dimension, the class token among it.
        betas: AdamW betas.
        warmup_fraction: Linear warm-up as a fraction of all steps.
        layer_warmup: A group whose learning rate is scaled by f warms up over (1 - f) of the warm-up's steps, so that
            the last layers start first; off, all groups warm up together.
        drop_path_rate: Stochastic depth rate.
        ema_decay: Decay of the moving average of the weights, which is scored; 0 turns it off. By default the published
            0.9999, or in a run of fewer than 50,000 steps n the decay 1 - 5 / n.
        clip_grad_norm: Largest norm of the gradient; 0 turns clipping off.
        freeze_patch_embed: Keep the patch embedding as it is.
        attention: Of a NEPA predictor: ``bidirectional``, as in the released script and its checkpoints, or ``causal``,
            which the paper's text calls the default; ``None`` keeps the model's own.
        qk_norm_affine: Give a NEPA predictor's QK-norm a learned weight, which starts at one, as in the released
            fine-tuned checkpoints.
        select: Score the network after the ``last`` epoch, or the ``best`` of all epochs on the validation images. The
            published accuracies are the best of 100; a maximum over evaluations is higher than the accuracy on new
            images.
        auto_augment: timm's name of the augmentation policy; empty for none.
        random_erasing: Probability of erasing a rectangle.
        crop_scale: Range of the random crop's area as a fraction of the image.
        crop_ratio: Range of the random crop's aspect ratio.
        hflip_prob: Probability of a horizontal flip.
        mixup: Mixup's alpha; 0 turns it off.
        cutmix: CutMix's alpha; 0 turns it off.
        mixup_switch_prob: Probability of CutMix where both are on.
        label_smoothing: Label smoothing.
    """

    epochs: PositiveInt = 100
    batch_size: PositiveInt = 1024
    accumulate: PositiveInt = 1
    lr: PositiveLearningRate = 1.5e-3
    head_lr: PositiveLearningRate | None = 1e-3
    layer_decay: PositiveFraction = 0.65
    weight_decay: NonNegativeFloat = 0.05
    betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.999)
    warmup_fraction: Fraction = 0.2
    layer_warmup: bool = True
    drop_path_rate: FractionBelowOne = 0.1
    ema_decay: FractionBelowOne | None = None
    clip_grad_norm: NonNegativeFloat = 1.0
    freeze_patch_embed: bool = True
    attention: Literal["causal", "bidirectional"] | None = "bidirectional"
    qk_norm_affine: bool = True
    select: Literal["last", "best"] = "last"
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    random_erasing: Fraction = 0.25
    crop_scale: Scale = (0.08, 1.0)
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 4 / 3)
    hflip_prob: Fraction = 0.5
    mixup: NonNegativeFloat = 0.8
    cutmix: NonNegativeFloat = 1.0
    mixup_switch_prob: Fraction = 0.5
    label_smoothing: FractionBelowOne = 0.1

    def __post_init__(self) -> None:
        check_ranges(type(self), vars(self), "finetune.")
        if self.crop_ratio[0] > self.crop_ratio[1]:
            raise ValueError(f"finetune.crop_ratio must be in order, got {list(self.crop_ratio)}.")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"finetune.accumulate {self.accumulate} does not divide finetune.batch_size {self.batch_size}."
            )
        if self.select not in ("last", "best"):
            raise ValueError(f"finetune.select must be last or best, got {self.select!r}.")
        try:
            create_transform(32, is_training=True, auto_augment=self.auto_augment or None)
        except Exception as error:  # timm asserts, looks up and converts what the name holds
            raise ValueError(
                f"finetune.auto_augment {self.auto_augment!r} is none of timm's policies; the published one is "
                "rand-m9-mstd0.5-inc1, and '' is none."
            ) from error

    def transform(self, form: ImageFormat) -> Any:
        """Return the training augmentation, timm's."""
        return create_transform(
            form.size,
            is_training=True,
            scale=(self.crop_scale[0], self.crop_scale[1]),
            ratio=(self.crop_ratio[0], self.crop_ratio[1]),
            hflip=self.hflip_prob,
            color_jitter=0.0,
            auto_augment=self.auto_augment or None,
            interpolation="bicubic",
            mean=form.mean,
            std=form.std,
            re_prob=self.random_erasing,
            re_mode="pixel",
        )


def classifier(model: Any, num_classes: int, options: FinetuneOptions) -> nn.Module:
    """Return a copy of a backbone with a classification head: mean of the patch tokens, LayerNorm, zero linear layer.

    Args:
        model: A timm ViT that was built by name; it is left as it is.
        num_classes: Number of classes.
        options: Drop path, attention, and what is frozen.

    Returns:
        A network from images (B, C, H, W) to logits (B, num_classes).

    Raises:
        ValueError: If an attention mode is asked for that the model cannot have.
    """
    if options.attention == "causal" and not isinstance(model, NepaViT):
        raise ValueError(f"finetune.attention: {type(model).__name__} has bidirectional attention only.")
    config = backbone_config(model)
    args = dict(config.get("model_args") or {}) | {"drop_path_rate": options.drop_path_rate}
    state = model.state_dict()
    if isinstance(model, NepaViT) and options.qk_norm_affine:
        args["qk_norm_affine"] = True
    copy: Any = timm.create_model(config["architecture"], **args)
    for name, value in copy.state_dict().items():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            state.setdefault(name, value)  # ones
    copy.load_state_dict(state)
    if isinstance(copy, NepaViT):
        if options.attention is not None:
            copy.set_attention(options.attention)
        copy.reset_classifier(0, "")
        copy.reset_classifier(num_classes)
        network: nn.Module = copy
    else:
        network = MeanClassifier(copy, num_classes)
    if options.freeze_patch_embed:
        copy.patch_embed.requires_grad_(False)
    return network


class MeanClassifier(nn.Module):
    """A ViT with the head of fine-tuned NEPA.

    Args:
        backbone: A timm ViT.
        num_classes: Number of classes.
    """

    def __init__(self, backbone: Any, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.backbone.reset_classifier(0, "")
        self.fc_norm = nn.LayerNorm(backbone.num_features, eps=1e-12)
        self.head = nn.Linear(backbone.num_features, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes)."""
        tokens = self.backbone.forward_features(images)
        return self.head(self.fc_norm(tokens[:, self.backbone.num_prefix_tokens :].mean(dim=1)))


def layer_scale(name: str, depth: int, decay: float) -> float | None:
    """Return the learning-rate factor of a parameter: decay^(L - 1 - i) in block i, decay^L before the blocks.

    It is 1 for the norm between pooling and head, and ``None`` for the final norm and the head, which have a learning
    rate of their own.
    """
    name = name.removeprefix("backbone.")
    if match := re.match(r"blocks\.(\d+)\.", name):
        return float(decay ** (depth - 1 - int(match[1])))
    if name.startswith("fc_norm."):
        return 1.0
    return None if re.match(r"(norm|head)\.", name) else float(decay**depth)


def parameter_groups(network: nn.Module, depth: int, lr: float, options: FinetuneOptions) -> list[dict[str, Any]]:
    """Return AdamW groups by layer and kind of parameter, each with its ``lr`` and ``lr_scale``."""
    groups: dict[tuple[float | None, bool], dict[str, Any]] = {}
    head_lr = lr if options.head_lr is None else options.head_lr
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        scale, matrix = layer_scale(name, depth, options.layer_decay), parameter.ndim > 1
        group = {
            "params": [],
            "lr": head_lr if scale is None else lr * scale,
            "weight_decay": options.weight_decay if matrix else 0.0,
            "lr_scale": 1.0 if scale is None else scale,
        }
        groups.setdefault((scale, matrix), group)["params"].append(parameter)
    return list(groups.values())


def lr_factor(step: int, steps: int, warmup: float) -> float:
    """Return linear warm-up over at least one step, then cosine to zero at the last."""
    warmup = max(1.0, warmup)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, steps - warmup))))


class Finetune(LightningModule):
    """Trains a classifier end to end and scores it.

    Args:
        network: From images (B, C, H, W) to logits (B, num_classes).
        num_classes: Number of classes.
        depth: Number of the network's blocks.
        options: The recipe.
        batch_size: Images per step over all devices, which scales the learning rate.
    """

    def __init__(
        self, network: nn.Module, num_classes: int, depth: int, options: FinetuneOptions, batch_size: int
    ) -> None:
        super().__init__()
        self.network = network
        self.depth = depth
        self.options = options
        self.batch_size = batch_size
        self.mixup = None
        if options.mixup or options.cutmix:
            self.mixup = Mixup(
                options.mixup,
                options.cutmix,
                switch_prob=options.mixup_switch_prob,
                label_smoothing=options.label_smoothing,
                num_classes=num_classes,
            )
        self.soft_loss = SoftTargetCrossEntropy()
        self.loss = nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)
        self.accuracy = accuracies(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return self.network(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch of (images, labels, filenames)."""
        images, targets = batch[0], batch[1]
        if self.mixup is None:
            return self.loss(self(images), targets)
        mixed, soft_targets = self.mixup(images, targets)
        return self.soft_loss(self(mixed), soft_targets)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Count a batch's hits; torchmetrics adds the counts of all devices."""
        score(self, self.accuracy, self(batch[0]), batch[1])

    def configure_callbacks(self) -> list[Callback]:
        """Average the weights; the average is what is scored."""
        return [FusedEMA(self.options.ema_decay)] if self.options.ema_decay != 0 else []

    def configure_optimizers(self) -> Any:
        """Return AdamW with layer-wise decay, and each group's warm-up and cosine."""
        options, steps = self.options, int(self.trainer.estimated_stepping_batches)
        groups = parameter_groups(self.network, self.depth, options.lr * self.batch_size / 256, options)
        warmup = options.warmup_fraction * steps
        shares = [1 - group["lr_scale"] if options.layer_warmup else 1.0 for group in groups]
        factors: list[Callable[[int], float]] = [
            partial(lr_factor, steps=steps, warmup=warmup * share) for share in shares
        ]
        optimizer = AdamW(groups, betas=(options.betas[0], options.betas[1]))
        return [optimizer], [{"scheduler": LambdaLR(optimizer, factors), "interval": "step"}]


class BestEpoch(Callback):
    """Keeps the network of the epoch with the highest accuracy on the validation images, as it was scored.

    It has to come before the callback that averages the weights, which takes the average out again after a validation.

    Attributes:
        top1: The accuracy in per cent.
        epoch: The epoch, from 1.
        state: The network's weights, on the CPU.
    """

    top1, epoch = -1.0, 0

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Compare, over all processes."""
        top1 = 100 * float(pl_module.accuracy["top1"].compute())
        if top1 > self.top1:
            self.top1, self.epoch = top1, trainer.current_epoch + 1
            self.state = {name: value.detach().cpu().clone() for name, value in pl_module.network.state_dict().items()}


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
        seed: Of the head, the order and the augmentation.

    Returns:
        ``top1`` and ``top5`` (or of all classes, where there are fewer) in per cent with ``ema_decay``, the decay that
        was in force, and the fine-tuned network. With ``select="best"``, ``top1`` is that of the best epoch, and
        ``best_epoch`` and ``last_top1`` are given in place of ``top5``.
    """
    num_classes = len(images.classes)
    batch = batch_per_process(options.batch_size // options.accumulate, len(images.train), runtime.world_size)
    batch = max(2, batch - batch % 2)  # Mixup pairs images
    total = batch * options.accumulate * runtime.world_size
    with quiet(seed + runtime.rank):  # other mixtures and dropped paths on every device; DDP broadcasts the weights
        network = classifier(model, num_classes, options)
        if isinstance(network, NepaViT):
            name_classes(network, images.classes)
        module = Finetune(network, num_classes, len(model.blocks), options, total)
        clip = options.clip_grad_norm or None
        callbacks: list[Callback] = [FiniteTraining(rates := "--finetune.lr and --finetune.head_lr")]
        best = BestEpoch() if options.select == "best" else None
        trainer = runtime.trainer(
            options.epochs,
            [*callbacks, best] if best else callbacks,
            gradient_clip_val=clip,
            accumulate_grad_batches=options.accumulate,
            check_val_every_n_epoch=1 if best else options.epochs,
        )
        train = shuffled_loader(images.train, options.transform(form), runtime, batch, seed, trainer, num_workers)
        val = ordered_loader(images.val, form.evaluation(), runtime, batch, num_workers)
        trainer.fit(module, train, val)
        averages = [callback for callback in trainer.callbacks if isinstance(callback, FusedEMA)]  # type: ignore[attr-defined]
        found = scores(trainer, rates) | {"ema_decay": averages[0].decay if averages else 0.0}
        if best is not None:
            network.load_state_dict(best.state)
            of_best = {"top1": best.top1, "best_epoch": best.epoch, "last_top1": found["top1"]}
            found = of_best | {"ema_decay": found["ema_decay"]}
        return found, network.eval()
