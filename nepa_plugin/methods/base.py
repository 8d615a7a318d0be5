"""What every self-supervised method shares: backbone, online probe, steps, logging."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import timm
import torch
from lightly.utils.benchmarking import OnlineLinearClassifier
from PIL import Image
from torch import Tensor

from nepa_plugin.checkpoints import (
    BACKBONE_CONFIG_KEY,
    BACKBONE_PREFIX_KEY,
    backbone_config,
    check_same_order,
    load_weights,
    read_checkpoint,
)
from nepa_plugin.data.samples import PADDING
from nepa_plugin.data.transforms import eval_transform
from nepa_plugin.methods.optimization import OptimizedModule
from nepa_plugin.runtime.ranges import (
    FractionBelowOne,
    LearningRate,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    check_hints,
    check_ranges,
)
from nepa_plugin.runtime.transfer import to_device

Batch = tuple[list[Tensor], Tensor, list[str]] | tuple[list[Tensor], Tensor, list[str], Sequence[Tensor]]


class Method(OptimizedModule):
    """Base of the methods. A subclass adds its modules, its transform and its step.

    Subclasses implement :meth:`step` and :meth:`train_transform`, check and change the backbone in
    :meth:`prepare_backbone`, and give their paper's recipe as the defaults of their constructor: where it differs from
    the one here, the argument stands in the subclass again, with its value. Everything else is here. :meth:`step` works
    without a trainer.

    Args:
        batch_size_per_device: Images per device and forward pass; with devices and accumulation it scales the
            learning rate.
        num_classes: Classes of the online linear probe; 0 or 1 trains no probe.
        backbone: timm model name.
        img_size: Image size in pixels.
        patch_size: Patch size in pixels; the named model's own by default.
        drop_path_rate: Stochastic depth rate.
        backbone_args: Further arguments of ``timm.create_model``.
        init_from: Checkpoint whose weights the backbone starts from (anything ``load_backbone`` reads).
        pool: What one feature per image is: ``"mean"`` of the patch tokens, or the ``"class"`` token.
        base_lr: Learning rate per 256 images of the global batch.
        min_lr: Learning rate at the end of the cosine.
        weight_decay: AdamW weight decay of matrices; biases, norms and LayerScale have none.
        final_weight_decay: Weight decay at the end of its own cosine; constant by default.
        betas: AdamW betas.
        warmup_fraction: Linear warm-up as a fraction of all steps.
        warmup_steps: Linear warm-up in steps; overrides the fraction.
        clip_grad_norm: Largest norm of the gradient (without the probe's); 0 turns clipping off.
        ema_decay: Decay of the moving average of the weights, which is validated and exported; 0 turns it off. By
            default the published 0.9999, or in a run of fewer than 50,000 steps n the decay 1 - 5 / n.
        nonfinite_steps: Steps whose loss or gradient may be not finite: their gradient is set to zero, and one more
            ends the run.
        grad_checkpointing: Recompute each block's activations in the backward pass instead of keeping them: a third
            more arithmetic, a fraction of the memory.

    Raises:
        ValueError: If the sizes do not fit, or the backbone's name is unknown.
    """

    #: Attribute that holds the backbone which is validated and exported; a momentum encoder in some methods.
    exported = "backbone"
    #: What is drawn once per batch, on the CPU: from a number of images to tensors, by torch's global generator. The
    #: data module calls it in the loader's processes, and :meth:`step` gets the result as a second argument.
    masks: Callable[[int], Sequence[Tensor]] | None = None

    def __init__(
        self,
        batch_size_per_device: PositiveInt = 256,
        num_classes: NonNegativeInt = 1000,
        *,
        backbone: str = "nepa_vit_base_patch14_224",
        img_size: PositiveInt = 224,
        patch_size: PositiveInt | None = None,
        drop_path_rate: FractionBelowOne = 0.0,
        backbone_args: dict[str, Any] | None = None,
        init_from: str | None = None,
        pool: Literal["mean", "class"] = "mean",
        base_lr: LearningRate = 3e-4,
        min_lr: LearningRate = 0.0,
        weight_decay: NonNegativeFloat = 0.05,
        final_weight_decay: NonNegativeFloat | None = None,
        betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.95),
        warmup_fraction: FractionBelowOne = 0.025,
        warmup_steps: NonNegativeInt | None = None,
        clip_grad_norm: NonNegativeFloat = 1.0,
        ema_decay: FractionBelowOne | None = None,
        nonfinite_steps: NonNegativeInt = 0,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # of the subclasses' constructors, too
        check_ranges(type(self), self.hparams)
        check_hints(
            dict.fromkeys(("depth", "embed_dim", "num_heads"), PositiveInt), backbone_args or {}, "backbone_args."
        )
        self.batch_size_per_device = batch_size_per_device
        self.img_size = img_size
        self.pool = pool
        self.base_lr = base_lr
        self.min_lr = min_lr
        self.weight_decay = weight_decay
        self.final_weight_decay = final_weight_decay
        self.betas = betas
        self.warmup_fraction = warmup_fraction
        self.warmup_steps = warmup_steps
        self.clip_grad_norm = clip_grad_norm
        self.ema_decay = ema_decay
        self.nonfinite_steps = nonfinite_steps
        args = {"img_size": img_size, "patch_size": patch_size, "drop_path_rate": drop_path_rate, "num_classes": 0}
        try:
            self.backbone: Any = timm.create_model(backbone, **(args | (backbone_args or {})))
        except RuntimeError as error:
            raise ValueError(f"backbone={backbone!r} is not a timm model: {error}") from error
        except ValueError:  # says itself what does not go together
            raise
        except Exception as error:  # whatever a constructor does with numbers that are no sizes
            raise ValueError(
                f"backbone={backbone!r} cannot be built with {args | (backbone_args or {})}: {error}. Give a timm "
                "Vision Transformer, and only arguments that it has."
            ) from error
        if grad_checkpointing:
            self.backbone.set_grad_checkpointing()
        #: Normalisation of the images: the backbone's own, which evaluation uses too.
        images: Any = self.backbone.pretrained_cfg
        self.mean, self.std = tuple(images["mean"]), tuple(images["std"])
        if init_from is not None:
            _, stored, weights = read_checkpoint(init_from)
            load_weights(self.backbone, weights, init_from)
            check_same_order(stored, self.backbone, str(init_from))
        self.online_classifier: OnlineLinearClassifier | None = None
        if num_classes > 1:
            self.online_classifier = OnlineLinearClassifier(
                feature_dim=self.backbone.num_features,
                num_classes=num_classes,
                topk=(1, min(5, num_classes)),
            )
        self.prepare_backbone(loaded=init_from is not None)

    # -- what a method adds --------------------------------------------------------------------------------------------

    def prepare_backbone(self, loaded: bool) -> None:
        """Check the backbone and change in it what the method needs; by default nothing.

        The constructor calls this before anything is copied from the backbone or built on it. What it reads of a
        subclass must be set before ``super().__init__``.

        Args:
            loaded: Whether the weights come from ``init_from`` and must stay.

        Raises:
            ValueError: If the method cannot train this backbone.
        """

    def step(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return (loss, features (B, D) for the online probe) of a batch of views, each (B, C, H, W).

        Methods with :attr:`masks` take those of the batch as a second argument, and draw them where there are none.
        """
        raise NotImplementedError

    def drawn_masks(self, images: Tensor, masks: Sequence[Tensor] | None) -> list[Tensor]:
        """Return the batch's masks on the device of its images (B, C, H, W): those given, or new ones."""
        assert self.masks is not None
        return [to_device(part, images.device) for part in (self.masks(len(images)) if masks is None else masks)]

    def train_transform(self) -> Callable[[Image.Image], list[Tensor]]:
        """Return the augmentation: from a PIL image to a list of views (C, H, W)."""
        raise NotImplementedError

    # -- features ------------------------------------------------------------------------------------------------------

    def pooled(self, tokens: Tensor) -> Tensor:
        """Return one feature per image (B, D) of the backbone's tokens (B, T, D), as ``pool`` says."""
        return tokens[:, 0] if self.pool == "class" else tokens[:, self.backbone.num_prefix_tokens :].mean(dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Return image features of the exported backbone.

        Args:
            images: Normalised images (B, C, H, W).

        Returns:
            Features after the final norm, (B, D).
        """
        return self.pooled(getattr(self, self.exported).forward_features(images))

    def first_weights(self, steps: int) -> float:
        """Return which part of the exported backbone is the first weights still, but for a moving average of all.

        Args:
            steps: Optimizer steps of the run.

        Returns:
            A fraction: 0 where what is trained is exported, more where a momentum encoder is.
        """
        return 0.0

    @property
    def attention(self) -> str:
        """The attention that the backbone is trained with, in words."""
        return str(getattr(self.backbone, "attention", "bidirectional"))

    # -- data ----------------------------------------------------------------------------------------------------------

    @property
    def normalize(self) -> dict[str, list[float]]:
        """The normalisation as lightly's transforms take it."""
        return {"mean": list(self.mean), "std": list(self.std)}

    def eval_transform(self, crop_pct: float = 0.875) -> Callable[[Image.Image], Tensor]:
        """Return the evaluation transform that fits :meth:`train_transform`'s size and normalisation."""
        return eval_transform(self.img_size, crop_pct, self.mean, self.std)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Train on one batch of (views, labels, filenames), and the masks where the method has any."""
        views, targets = batch[0], batch[1]
        views = [views] if isinstance(views, Tensor) else views
        loss, features = self.step(views, *batch[3:])
        self.note_loss(loss, len(targets))
        if self.online_classifier is None:
            return loss
        probe_loss, logs = self.online_classifier.training_step((features.detach(), targets), batch_idx)
        self.log_dict({name: self.mean_over_devices(value) for name, value in logs.items()})
        return loss + probe_loss

    def validation_step(self, batch: tuple[Tensor, Tensor, list[str]], batch_idx: int) -> Tensor | None:
        """Score the online probe on one batch of (images, labels, filenames)."""
        if self.online_classifier is None:
            return None
        images, targets = batch[0], batch[1]
        with torch.compiler.set_stance("force_eager"):  # the last batch is smaller: not worth graphs of its own
            features = self.forward(images).flatten(start_dim=1)
        scored = targets != PADDING
        count = int(scored.sum())
        if count:
            features, targets = features[scored], targets[scored]
        loss, logs = self.online_classifier.validation_step((features, targets.clamp(min=0)), batch_idx)
        # Every process logs, one that has nothing to score in this batch with weight 0: the means are collective.
        # Lightning takes the mean of the processes' weights, rounded down: that of 17 and 16 images would be 16.
        weight = count * (1 if self._trainer is None else self.trainer.world_size)
        self.log_dict(logs, prog_bar=True, sync_dist=True, batch_size=weight)
        return loss

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store how to rebuild the backbone, so that ``load_backbone`` reads the checkpoint without this class."""
        checkpoint[BACKBONE_CONFIG_KEY] = backbone_config(self.backbone)
        checkpoint[BACKBONE_PREFIX_KEY] = f"{self.exported}."
