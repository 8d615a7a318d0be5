"""What may make NEPA learn more, to be measured before any of it goes into the package (docs/better.md).

PYTHONPATH=benchmarks/tried nepa compare benchmarks/tried/configs/*.yaml --data digits --seeds 0 1 --jobs 2 \
    --evaluate finetune,readout,knn,linear --recipe vit_digits --finetune.epochs 10 --no_untrained --out runs/tried
"""

from typing import Any

import torch
import torch.nn.functional as F
from lightly.loss.lejepa_loss import SIGReg
from torch import Tensor, nn

from nepa_plugin.loss import ContrastiveNextEmbeddingLoss
from nepa_plugin.methods import NEPA
from nepa_plugin.methods.nepa import transform as transform


class BatchContrast(ContrastiveNextEmbeddingLoss):
    """InfoNCE among the patches of all images of the batch, as if they were one image's."""

    def _loss(self, targets: Tensor, predictions: Tensor, valid: Tensor | None) -> Tensor:
        if valid is not None:
            raise ValueError("The batch's contrast takes no padding.")
        return super()._loss(targets.flatten(0, 1)[None], predictions.flatten(0, 1)[None], None)


class Tried(NEPA):
    """NEPA with one more part; each is off by default.

    Args:
        linear_head: A plain linear layer between the transformer's outputs and the loss.
        batch_contrast: InfoNCE among the patches of the batch in place of the cosine.
        sigreg: Weight of SIGReg (arXiv 2511.08544) on the patch embeddings; the loss has one minus that.
        deep_supervision: Layers, from 1, whose outputs predict the next embedding, too, through a norm and a linear
            layer each; their mean loss is added.
        pixel_loss: Weight of the squared error of a linear layer that predicts the next patch's pixels, normalised
            patch by patch as in MAE, from the transformer's outputs.
        embedding_lr: The patch embedding's learning rate, as a multiple of the others'.
        embedding_warmup: Fraction of the steps over which that multiple rises from zero.
        prefix: Let the first patches, as many as each step draws, see one another, as AIM does (arXiv 2401.08541); only
            what comes behind them is predicted.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.NEPA`.
    """

    SAMPLE = 512  # tokens that SIGReg looks at

    def __init__(
        self,
        *args: Any,
        linear_head: bool = False,
        batch_contrast: bool = False,
        sigreg: float = 0.0,
        deep_supervision: list[int] | None = None,
        pixel_loss: float = 0.0,
        embedding_lr: float = 1.0,
        embedding_warmup: float = 0.0,
        prefix: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        dim = self.backbone.embed_dim
        if linear_head:
            self.heads = nn.Sequential(nn.Linear(dim, dim), _AsList())
        if batch_contrast:
            self.criterion = BatchContrast(self.criterion.shift, self.criterion.stop_gradient)
        self.sigreg = SIGReg(num_vectors=256) if sigreg else None
        self.sigreg_weight, self.pixel_weight = sigreg, pixel_loss
        self.deep_heads = nn.ModuleDict(
            {str(layer): nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim)) for layer in deep_supervision or []}
        )
        self.pixels = nn.Linear(dim, 3 * self.backbone.patch_embed.patch_size[0] ** 2) if pixel_loss else None
        self.embedding_lr, self.embedding_warmup = embedding_lr, embedding_warmup
        self.prefix, self.horizon = prefix, kwargs.get("horizon", 1)

    def step(self, views: list[Tensor], masks: Any = None) -> tuple[Tensor, Tensor]:
        """Return the loss with the further parts, and the features."""
        caught: dict[str, Tensor] = {}
        tokens = self.backbone.patch_embed.num_patches + self.backbone.num_prefix_tokens
        last = int(torch.randint(tokens - self.horizon, ())) if self.prefix else 0  # the prefix's last token
        predict = self.backbone.predict_next

        def watched(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            caught["embeddings"], caught["outputs"] = found = predict(*args, **kwargs)
            return found[0][:, last:], found[1][:, last:]

        hooks = [
            self.backbone.blocks[int(layer) - 1].register_forward_hook(
                lambda module, args, output, layer=layer: caught.__setitem__(layer, output)
            )
            for layer in self.deep_heads
        ]
        if self.prefix:
            places = torch.arange(tokens, device=views[0].device)
            seen = {"attn_mask": (places <= places[:, None]) | (places <= last), "is_causal": False}
            hooks += [
                block.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs | seen), with_kwargs=True)
                for block in self.backbone.blocks
            ]
        self.backbone.predict_next = watched
        try:
            loss, features = super().step(views, masks)
        finally:
            del self.backbone.predict_next
            for hook in hooks:
                hook.remove()
        for layer, head in self.deep_heads.items():
            deep = self.criterion(caught["embeddings"][:, last:], head(caught[layer][:, last:]))
            loss = loss + deep / len(self.deep_heads)
        if self.sigreg is not None:
            patches = caught["embeddings"][:, self.backbone.num_prefix_tokens :].flatten(0, 1)
            drawn = torch.randint(len(patches), (self.SAMPLE,), device=patches.device)
            loss = (1 - self.sigreg_weight) * loss + self.sigreg_weight * self.sigreg(patches[drawn])
        if self.pixels is not None:
            size = self.backbone.patch_embed.patch_size[0]
            patches = F.unfold(views[0], size, stride=size).transpose(1, 2)
            patches = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
            loss = loss + self.pixel_weight * F.mse_loss(self.pixels(caught["outputs"][:, last:-1]), patches[:, last:])
        return loss, features

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Let the patch embedding go only a part of its step: AdamW's is in proportion to the learning rate."""
        part = self.embedding_lr
        if self.embedding_warmup:
            steps = self.embedding_warmup * int(self.trainer.estimated_stepping_batches)
            part *= min(1.0, self.trainer.global_step / steps)
        if part == 1:
            super().optimizer_step(*args, **kwargs)
            return
        own = list(self.backbone.patch_embed.parameters())
        before = [parameter.detach().clone() for parameter in own]
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            for parameter, old in zip(own, before, strict=True):
                parameter.copy_(torch.lerp(old, parameter, part))


class _AsList(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]
