"""How a network is fine-tuned."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from timm.data import create_transform

from nepa_plugin.data.evaluation import ImageFormat
from nepa_plugin.finetuning.augmentation import allow_black
from nepa_plugin.runtime.ranges import (
    Fraction,
    FractionBelowOne,
    NonNegativeFloat,
    PositiveFloat,
    PositiveFraction,
    PositiveLearningRate,
    Scale,
    check_ranges,
)


@dataclass
class Recipe:
    """What fine-tuning does to the weights and the images; by default what is published of ViT-B (arXiv 2512.16922).

    Args:
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
        select: Take the network after the ``last`` epoch, or the ``best`` of all epochs on the validation images. The
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

    #: What stands before an option's name on the command line.
    prefix: ClassVar[str] = "model."

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
        name = self.prefix
        check_ranges(type(self), vars(self), name)
        if self.crop_ratio[0] > self.crop_ratio[1]:
            raise ValueError(f"{name}crop_ratio must be in order, got {list(self.crop_ratio)}.")
        for option, choices in (("select", ("last", "best")), ("attention", ("causal", "bidirectional", None))):
            if getattr(self, option) not in choices:
                given = " or ".join("null" if choice is None else choice for choice in choices)
                raise ValueError(f"{name}{option} must be {given}, got {getattr(self, option)!r}.")
        try:
            create_transform(32, is_training=True, auto_augment=self.auto_augment or None)
        except Exception as error:  # timm asserts, looks up and converts what the name holds
            raise ValueError(
                f"{name}auto_augment {self.auto_augment!r} is none of timm's policies; the published one is "
                "rand-m9-mstd0.5-inc1, and '' is none."
            ) from error

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, in pairs: a batch must be even then."""
        return bool(self.mixup or self.cutmix)

    def transform(self, form: ImageFormat) -> Any:
        """Return the training augmentation, timm's."""
        transform = create_transform(
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
        return allow_black(transform)
