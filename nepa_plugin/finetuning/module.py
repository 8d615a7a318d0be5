"""The module that Lightning trains when a network is fine-tuned."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from PIL import Image
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from nepa_plugin.checkpoints import BACKBONE_CONFIG_KEY, BACKBONE_PREFIX_KEY, backbone_config
from nepa_plugin.data.evaluation import ImageFormat
from nepa_plugin.data.samples import PADDING
from nepa_plugin.data.transforms import CropMode
from nepa_plugin.finetuning.optimization import lr_factor, parameter_groups
from nepa_plugin.finetuning.recipe import Recipe
from nepa_plugin.methods.optimization import OptimizedModule
from nepa_plugin.methods.schedules import GroupSchedule
from nepa_plugin.runtime.scoring import accuracies, score


class OneView:
    """An augmentation as the data module takes it: a list of one view.

    Args:
        transform: From a PIL image to a tensor (C, H, W).
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> list[Tensor]:
        """Return the view of an image."""
        return [self.transform(image)]


class ClassifierModule(OptimizedModule):
    """Trains a classifier end to end, and scores it.

    Args:
        network: From images (B, C, H, W) to logits (B, num_classes); built by timm's name, with ``blocks``.
        recipe: How.
        batch_size_per_device: Images per device and forward pass; with devices and accumulation it scales the learning
            rate.
        nonfinite_steps: Steps whose loss or gradient may be not finite: their gradient is set to zero, and one more
            ends the run.
    """

    rate = "lr"
    online_classifier = None
    final_weight_decay = None

    def __init__(self, network: Any, recipe: Recipe, batch_size_per_device: int, nonfinite_steps: int = 0) -> None:
        super().__init__()
        self.network = network
        self.recipe = recipe
        self.batch_size_per_device = batch_size_per_device
        self.nonfinite_steps = nonfinite_steps
        self.lr, self.clip_grad_norm, self.ema_decay = recipe.lr, recipe.clip_grad_norm, recipe.ema_decay
        num_classes = network.num_classes
        self.mixup = None
        if recipe.mixes:
            self.mixup = Mixup(
                recipe.mixup,
                recipe.cutmix,
                switch_prob=recipe.mixup_switch_prob,
                label_smoothing=recipe.label_smoothing,
                num_classes=num_classes,
            )
        self.soft_loss = SoftTargetCrossEntropy()
        self.loss = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
        self.accuracy = accuracies(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.network(images)
        return logits

    # -- data ----------------------------------------------------------------------------------------------------------

    def train_transform(self) -> Callable[[Image.Image], list[Tensor]]:
        """Return the augmentation: from a PIL image to a list of one view (C, H, W)."""
        return OneView(self.recipe.transform(ImageFormat.of(self.network)))

    def eval_transform(self, crop_pct: float | None = None, crop_mode: CropMode = "center") -> Callable[..., Tensor]:
        """Return the transform of the scored images, by default with the network's own crop."""
        return ImageFormat.of(self.network, crop_pct, crop_mode).evaluation()

    # -- steps ---------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch of (views, labels, filenames); the one view may be in a list."""
        images, targets = batch[0], batch[1]
        images = images if isinstance(images, Tensor) else images[0]
        if self.mixup is None:
            loss = self.loss(self(images), targets)
        else:
            mixed, soft_targets = self.mixup(images, targets)
            loss = self.soft_loss(self(mixed), soft_targets)
        self.note_loss(loss, len(targets))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Count a batch's hits; torchmetrics adds the counts of all devices."""
        images, targets = batch[0], batch[1]
        with torch.compiler.set_stance("force_eager"):  # the last batch is smaller: not worth graphs of its own
            logits = self(images)
        scored = targets != PADDING
        score(self, self.accuracy, logits[scored], targets[scored])

    # -- optimization --------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Return AdamW with layer-wise decay, and each group's warm-up and cosine."""
        recipe, steps = self.recipe, self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("The schedule needs an end: set trainer.max_epochs or trainer.max_steps.")
        steps = int(steps)
        lr = recipe.lr * self.global_batch_size / 256
        depth = len(self.network.blocks)
        groups = parameter_groups(self.network, depth, lr, recipe)
        warmup = recipe.warmup_fraction * steps
        shares = [1 - group["lr_scale"] if recipe.layer_warmup else 1.0 for group in groups]
        factors = [partial(lr_factor, steps=steps, warmup=warmup * share) for share in shares]
        self._last_block = next(i for i, group in enumerate(groups) if group["lr_scale"] == 1 and not group["head"])
        self._head = next(i for i, group in enumerate(groups) if group["head"])
        optimizer = AdamW(groups, betas=(recipe.betas[0], recipe.betas[1]), fused=self._fused_optimizer or None)
        asked = {
            "steps": steps,
            "warm-up steps": warmup,
            "learning rate": lr,
            "head's learning rate": groups[self._head]["lr"],
            "layer decay": recipe.layer_decay,
            "layer-wise warm-up": float(recipe.layer_warmup),
        }
        self._announce(lr, steps, round(warmup))
        schedule = GroupSchedule(optimizer, factors, asked, self._last_block)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def rates(self, optimizer: Optimizer) -> dict[str, float]:
        """Return the learning rates of the last block and of the head."""
        groups = optimizer.param_groups
        return {"lr": groups[self._last_block]["lr"], "head_lr": groups[self._head]["lr"]}

    def _announce(self, lr: float, steps: int, warmup: int) -> None:
        recipe, trainer = self.recipe, self.trainer
        head = lr if recipe.head_lr is None else recipe.head_lr
        first = lr * recipe.layer_decay ** (len(self.network.blocks) - 1)
        rank_zero_info(
            f"Global batch {self.global_batch_size} = {self.batch_size_per_device} per device x {trainer.world_size} "
            f"device(s) x {trainer.accumulate_grad_batches} accumulated. Learning rate of the last block {lr:.3g} = "
            f"{recipe.lr:.3g} x {self.global_batch_size} / 256, of the first {first:.3g}, "
            f"of the head {head:.3g}, over {steps} steps, {warmup} of them warm-up"
            f"{' (fewer for the last layers)' if recipe.layer_warmup else ''}."
        )

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store how to rebuild the network, so that ``load_backbone`` reads the checkpoint without this class."""
        checkpoint[BACKBONE_CONFIG_KEY] = backbone_config(self.network)
        checkpoint[BACKBONE_PREFIX_KEY] = "network."
