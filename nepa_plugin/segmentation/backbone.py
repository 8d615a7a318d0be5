"""Vision Transformers of timm as an mmengine backbone: feature maps for mmsegmentation, mmdetection and mmpretrain."""

import difflib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from nepa_plugin.checkpoints import CheckpointError, load_backbone, load_weights, read_checkpoint
from nepa_plugin.predictor import ATTENTION_MODES, AttentionMode, NepaViT
from nepa_plugin.segmentation.errors import ConfigError


@MODELS.register_module()
class TimmViT(BaseModule):
    """A timm Vision Transformer that returns feature maps of chosen blocks.

    Takes images of any size. RoPE and position embeddings follow the patch grid; an image that the patch size does not
    divide is resized bilinearly to the next multiple, so that every feature map covers exactly the image.

    Args:
        arch: timm name with ``blocks`` and ``forward_intermediates``: ``"nepa_vit_base_patch14_224"``,
            ``"vit_base_patch16_224"``, ...
        img_size: Image size in pixels that position embeddings are stored for. Default: the architecture's.
        patch_size: Patch size in pixels. If it is given and differs from the checkpoint's, the patch embedding is
            resampled (timm's function, FlexiViT). Default: the architecture's, which must be the checkpoint's.
        out_indices: Blocks whose outputs are returned, from 0; negative ones count from the last.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0 at the first.
        attention: ``"bidirectional"`` or ``"causal"``; causal only for NEPA's predictor.
        final_norm: Apply the final norm to every output.
        frozen_stages: -1 freezes nothing, 0 the embedding, i the embedding and the first i blocks.
        with_cp: Recompute activations in the backward pass to save memory.
        model_args: Further arguments of the architecture, e.g. ``dict(embed_dim=128, depth=4, num_heads=4)``. What of
            NEPA's predictor differs between published files (QK-norm and its weight, activation, gate and width of the
            MLP, LayerScale) is the checkpoint's where it is not given.
        init_cfg: ``dict(type="Pretrained", checkpoint=...)`` where the checkpoint is all that
            :func:`nepa_plugin.load_backbone` takes: a timm folder, a published NEPA folder, a hub id, a ``.ckpt`` of a
            pretraining run, or an mmengine ``.pth`` written with
            :class:`~nepa_plugin.segmentation.CheckpointGuardHook`. ``weights="raw"`` takes the raw weights of a run
            folder of the published code instead of the averaged ones. ``None`` starts from random weights.

    Raises:
        ConfigError: On an unknown architecture, attention mode, or blocks past the depth.
    """

    def __init__(
        self,
        arch: str,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | None = None,
        out_indices: Sequence[int] = (-1,),
        drop_path_rate: float = 0.0,
        attention: AttentionMode = "bidirectional",
        final_norm: bool = False,
        frozen_stages: int = -1,
        with_cp: bool = False,
        model_args: dict[str, Any] | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if init_cfg is not None and (
            init_cfg.get("type") != "Pretrained"
            or "checkpoint" not in init_cfg
            or set(init_cfg) - {"type", "checkpoint", "weights"}
            or init_cfg.get("weights", "average") not in ("average", "raw")
        ):
            raise ConfigError(
                f"init_cfg={dict(init_cfg)}: this backbone takes dict(type='Pretrained', checkpoint=...), also with "
                "weights='average' or 'raw', or None."
            )
        if init_cfg is not None and not isinstance(init_cfg["checkpoint"], (str, Path)):
            raise ConfigError(f"init_cfg.checkpoint={init_cfg['checkpoint']!r} is no path and no hub id.")
        for name, number in (("frozen_stages", frozen_stages), *(("out_indices", i) for i in out_indices)):
            if not isinstance(number, int):
                raise ConfigError(f"{name}: {number!r} is no whole number.")
        self.arch, self.resample_patches = arch, patch_size is not None
        args: dict[str, Any] = {"num_classes": 0, "global_pool": "", "dynamic_img_size": True}
        args |= {"drop_path_rate": drop_path_rate, **_details(arch, init_cfg), **(model_args or {})}
        args |= {k: v for k, v in {"img_size": img_size, "patch_size": patch_size}.items() if v is not None}
        self.vit: Any = _create(arch, args)
        if isinstance(self.vit, NepaViT):
            self.vit.set_attention(attention)
        elif attention not in ATTENTION_MODES:
            raise ConfigError(f"attention={attention!r} is not one of {ATTENTION_MODES}.")
        elif attention != "bidirectional":
            raise ConfigError(f"attention={attention!r} is only for NEPA's predictor; {arch} is bidirectional.")
        depth = len(self.vit.blocks)
        self.out_indices = tuple(i + depth if i < 0 else i for i in out_indices)
        if not self.out_indices or not all(0 <= i < depth for i in self.out_indices):
            raise ConfigError(
                f"out_indices={tuple(out_indices)}: {arch} has {depth} blocks, 0 to {depth - 1}; choose among them."
            )
        if list(self.out_indices) != sorted(set(self.out_indices)):
            raise ConfigError(f"out_indices={tuple(out_indices)} must be increasing.")
        if not -1 <= frozen_stages <= depth:
            raise ConfigError(f"frozen_stages={frozen_stages}: {arch} has {depth} blocks; give -1 to {depth}.")
        self.final_norm, self.frozen_stages = final_norm, frozen_stages
        if with_cp:
            self.vit.set_grad_checkpointing(True)
        # What no output depends on gets no gradient, so that DistributedDataParallel does not wait for one.
        unused = [*self.vit.blocks[self.out_indices[-1] + 1 :], *([] if final_norm else [self.vit.norm])]
        for module in unused:
            module.requires_grad_(False)
        self._freeze()

    def init_weights(self) -> None:
        """Load the checkpoint of ``init_cfg``, every weight of it or none.

        Raises:
            FileNotFoundError: If there is no such checkpoint.
            CheckpointError: If it is damaged or of another architecture; names what differs.
        """
        if self.init_cfg is None or self.is_init:
            return
        source = self.init_cfg["checkpoint"]
        pretrained = load_backbone(source, self.init_cfg.get("weights", "average"))
        self._check_same_architecture(pretrained, source)
        patch_embed = self.vit.patch_embed
        if isinstance(pretrained.patch_embed.img_size, tuple):
            pretrained.set_input_size(patch_embed.img_size, patch_embed.patch_size)
        # a classifier's head and the norm before it are not part of the backbone
        state = {k: v for k, v in pretrained.state_dict().items() if not k.startswith(("head.", "fc_norm."))}
        load_weights(self.vit, state, str(source))
        self._is_init = True

    def check_built_as(self, config: dict[str, Any], source: str) -> None:
        """Compare with what a segmentation checkpoint says of its backbone: not all of it shows in the weights' shapes.

        A training takes such details from the pretrained backbone; where that is not, as when its result is tested
        elsewhere, they have to be in the config.

        Args:
            config: timm's, as :func:`nepa_plugin.checkpoints.backbone_config` returns it.
            source: What to call the checkpoint in the error.

        Raises:
            CheckpointError: If something differs; says what.
        """
        with torch.device("meta"):  # no memory, no time
            other = _create(config["architecture"], {**config.get("model_args", {}), "num_classes": 0})
        self._check_same_architecture(other, source)

    def _check_same_architecture(self, other: nn.Module, source: str) -> None:
        """Compare what the shapes of the weights do not show, so that nothing loads that computes something else."""
        own, theirs = _signature(self.vit), _signature(other)
        if self.resample_patches:
            theirs["patch_size"] = own["patch_size"]
        different = [f"{key} is {theirs[key]}, the config has {own[key]}" for key in own if own[key] != theirs[key]]
        if different:
            raise CheckpointError(
                f"{source} is not the backbone that the config builds (arch={self.arch!r}): {'; '.join(different)}. "
                "Change arch, patch_size or model_args, or take the checkpoint of this architecture."
            )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return one feature map per entry of ``out_indices``.

        Args:
            images: Normalised images (B, 3, H, W).

        Returns:
            Maps (B, D, ceil(H / p), ceil(W / p)) for patch size p.
        """
        size, patch = images.shape[-2:], self.vit.patch_embed.patch_size
        target = [math.ceil(s / p) * p for s, p in zip(size, patch, strict=True)]
        if list(size) != target:
            images = F.interpolate(images, size=target, mode="bilinear", antialias=True)
        return tuple(
            self.vit.forward_intermediates(
                images,
                indices=list(self.out_indices),
                norm=self.final_norm,
                stop_early=True,
                output_fmt="NCHW",
                intermediates_only=True,
            )
        )

    def train(self, mode: bool = True) -> "TimmViT":
        """Set the training mode; frozen blocks stay in evaluation mode."""
        super().train(mode)
        self._freeze()
        return self

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        for name, parameter in self.vit.named_parameters():
            if not name.startswith(("blocks.", "norm.")):
                parameter.requires_grad_(False)
        for block in self.vit.blocks[: self.frozen_stages]:
            block.eval().requires_grad_(False)


#: Arguments of NEPA's predictor in which published files of one size differ.
DETAILS = ("qk_norm", "qk_norm_affine", "mlp_act", "swiglu_mlp", "mlp_ratio", "init_values", "order")


def _details(arch: str, init_cfg: dict | None) -> dict[str, Any]:
    """Return what a NEPA predictor's checkpoint says of ``DETAILS``.

    Where it cannot be read, as when a trained segmentation model is tested elsewhere, it says nothing; a training,
    which needs it, then ends where the weights are loaded.
    """
    if init_cfg is None or not arch.startswith("nepa_vit_"):
        return {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is said again when the weights are loaded
            _, args, _ = read_checkpoint(init_cfg["checkpoint"], init_cfg.get("weights", "average"))
    except (OSError, CheckpointError):
        return {}
    return {name: args[name] for name in DETAILS if name in args}


def _create(arch: str, args: dict[str, Any]) -> Any:
    if not timm.is_model(arch):
        near = " or ".join(difflib.get_close_matches(arch, timm.list_models(), n=3, cutoff=0.5))
        raise ConfigError(f"arch={arch!r} is not a timm model." + (f" Did you mean {near}?" if near else ""))
    try:
        model = timm.create_model(arch, pretrained=False, **args)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"arch={arch!r} cannot be built as a ViT backbone: {error}") from error
    if not all(hasattr(model, name) for name in ("blocks", "patch_embed", "norm", "forward_intermediates")):
        raise ConfigError(f"arch={arch!r} is a {type(model).__name__}, not a Vision Transformer of timm.")
    return model


def _signature(model: Any) -> dict[str, Any]:
    attention = model.blocks[0].attn
    rope = getattr(model, "rope", None)
    return {
        "class": type(model).__name__,
        "patch_size": tuple(model.patch_embed.patch_size),
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": attention.num_heads,
        "rope_temperature": getattr(rope, "temperature", None),
        "qk_norm": isinstance(getattr(attention, "q_norm", None), nn.LayerNorm),
        "qk_norm_affine": isinstance(getattr(getattr(attention, "q_norm", None), "weight", None), nn.Parameter),
        "activation": type(getattr(model.blocks[0].mlp, "act", None)).__name__,
        "mlp": type(model.blocks[0].mlp).__name__,
        "order": getattr(model, "order", None),
    }
