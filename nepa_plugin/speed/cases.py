"""What is timed: a method, or the plain timm model, at one size and precision."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from timm.models.eva import Eva
from torch import nn

from nepa_plugin import methods
from nepa_plugin.methods import Method
from nepa_plugin.models import MODEL_SIZES
from nepa_plugin.predictor import NepaViT
from nepa_plugin.runtime.ranges import PositiveInt, check_ranges
from nepa_plugin.speed.written_out import WrittenOut

#: The contenders that are no method, in a bare PyTorch loop: timm's own ``Eva`` of the same size, and NEPA's step
#: without any fused kernel.
PLAIN = ("timm", "written-out")
#: Methods that train the NEPA predictor causally, unless a case says otherwise.
CAUSAL = ("nepa", "cpc", "igpt")
#: Methods whose ImageNet configs train the NEPA predictor; the masked ones take the plain ViT of the same size.
ON_PREDICTOR = (*CAUSAL, "simclr", "mocov3", "simsiam", "byol", "dino", "lejepa")
NAMES: dict[str, type[Method]] = {
    cls.__name__.lower(): cls
    for cls in (getattr(methods, name) for name in methods.__all__)
    if isinstance(cls, type) and issubclass(cls, Method) and cls.step is not Method.step
}


@dataclass(frozen=True)
class Case:
    """One contender at one size.

    Attributes:
        contender: Name of a method in lower case, ``"timm"``, or ``"written-out"``.
        model: ``"tiny"`` ... ``"huge"``.
        img_size: Image size in pixels.
        patch_size: Patch size in pixels.
        batch_size: Images per device and step.
        precision: Lightning's name, such as ``"bf16-mixed"`` or ``"32-true"``.
        compiled: Whether ``torch.compile`` is used.
        attention: NEPA's, CPC's and iGPT's, ``"causal"`` or ``"bidirectional"``; the others have ``"bidirectional"``.
        depth: Blocks, where not the model's own.
        grad_checkpointing: Whether activations are recomputed.
        pipeline: The data module's pipeline, where images are read.
    """

    contender: str = "nepa"
    model: str = "base"
    img_size: PositiveInt = 224
    patch_size: PositiveInt = 14
    batch_size: PositiveInt = 64
    precision: str = "bf16-mixed"
    compiled: bool = False
    attention: str = "causal"
    depth: PositiveInt | None = None
    grad_checkpointing: bool = False
    pipeline: str = "pil"

    def __post_init__(self) -> None:
        check_ranges(type(self), vars(self))
        if self.contender not in (*NAMES, *PLAIN):
            raise ValueError(f"No method {self.contender!r} to time: choose from {', '.join([*NAMES, *PLAIN])}.")
        if self.model not in MODEL_SIZES:
            raise ValueError(f"model={self.model!r} is none of {', '.join(MODEL_SIZES)}.")
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size {self.img_size} is no multiple of patch_size {self.patch_size}.")
        if self.precision not in ("32-true", "bf16-mixed", "16-mixed"):
            raise ValueError(f"precision={self.precision!r} is none of 32-true, bf16-mixed, 16-mixed.")

    @property
    def tokens(self) -> int:
        """Tokens of a full view, class token included."""
        return 1 + (self.img_size // self.patch_size) ** 2

    @property
    def label(self) -> str:
        """The case in words."""
        parts = [self.contender, self.model, f"{self.img_size}px", f"batch {self.batch_size}", self.precision]
        parts += [self.attention] if self.contender in (*CAUSAL, "written-out") else []
        parts += [f"depth {self.depth}"] if self.depth else []
        parts += [self.pipeline] if self.pipeline != "pil" else []
        parts += ["compiled"] if self.compiled else []
        parts += ["checkpointed"] if self.grad_checkpointing else []
        return ", ".join(parts)

    def method(self) -> Method:
        """Build the method, with its own recipe and the size of this case."""
        extra: dict[str, Any] = {"depth": self.depth} if self.depth else {}
        on_predictor = self.contender in ON_PREDICTOR
        if on_predictor:
            extra["attention"] = self.attention
        method = NAMES[self.contender](
            batch_size_per_device=self.batch_size,
            num_classes=1000,
            backbone=f"{'nepa' if on_predictor else 'plain'}_vit_{self.model}_patch14_224",
            img_size=self.img_size,
            patch_size=self.patch_size,
            backbone_args=extra,
            grad_checkpointing=self.grad_checkpointing,
        )
        if self.contender in CAUSAL:
            method.backbone.set_attention(self.attention)
        return method

    def plain(self) -> Eva | WrittenOut:
        """Build timm's model with NEPA's arguments, its own QK-norm and attention, or NEPA's step written out."""
        embed_dim, depth, num_heads = MODEL_SIZES[self.model]
        if self.contender == "written-out":
            backbone = replace(self, contender="nepa").method().backbone
            assert isinstance(backbone, NepaViT)
            return WrittenOut(backbone)
        model = Eva(
            img_size=self.img_size,
            patch_size=self.patch_size,
            embed_dim=embed_dim,
            depth=self.depth or depth,
            num_heads=num_heads,
            mlp_ratio=4,
            qk_norm=True,
            attn_type="rope",
            init_values=1e-5,
            use_abs_pos_emb=False,
            use_rot_pos_emb=True,
            rope_type="dinov3",
            rope_temperature=100.0,
            rope_rotate_half=True,
            rope_rescale_coords=2.0,
            norm_layer=partial(nn.LayerNorm, eps=1e-12),
            use_post_transformer_norm=True,
            use_fc_norm=False,
            num_classes=0,
            global_pool="",
        )
        model.set_grad_checkpointing(self.grad_checkpointing)
        return model

    @property
    def dtype(self) -> torch.dtype:
        """The type of the matrix products."""
        return {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[self.precision]


def cases(compare: Sequence[str] = (), **choices: Sequence[Any]) -> list[Case]:
    """Return every combination of choices for NEPA, then for each other contender.

    Args:
        compare: Contenders beside NEPA.
        **choices: Values to try of :class:`Case`'s fields, by name.

    Returns:
        The cases, each once.

    Raises:
        ValueError: On an unknown contender or size.
    """
    found: list[Case] = []
    for contender in ("nepa", *compare):
        for values in itertools.product(*choices.values()):
            chosen = dict(zip(choices, values, strict=True))
            if contender not in (*CAUSAL, "written-out"):
                chosen["attention"] = "bidirectional"
            case = Case(contender, **chosen)
            if case not in found:
                found.append(case)
    return found
