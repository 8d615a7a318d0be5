"""I-JEPA: predict the representations of target blocks from a context block (arXiv 2301.08243)."""

from collections.abc import Callable
from typing import Any

import torch
from lightly.data.ijepa_collate import IJEPAMaskCollator
from lightly.models.modules import IJEPAPredictorTIMM
from lightly.models.utils import apply_masks
from lightly.transforms.ijepa_transform import IJEPATransform
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from nepa_plugin.methods.masked import SingleView, check_maskable, fix_position_embedding, masked_encoder, with_prefix
from nepa_plugin.methods.momentum import MomentumMethod


class BlockMasks(IJEPAMaskCollator):
    """lightly's I-JEPA masks, drawn in the training step from torch's generator instead of in the loader's workers.

    Args:
        grid: Patches along a side.
        context_scale: Range of the context block's area as a fraction of the image.
        target_scale: Range of a target block's area as a fraction of the image.
        num_targets: Target blocks per image.
        min_keep: Every block keeps more patches than this.

    Raises:
        ValueError: If a block of the smallest size has no more than ``min_keep`` patches.
    """

    def __init__(
        self,
        grid: int,
        context_scale: tuple[float, float],
        target_scale: tuple[float, float],
        target_aspect_ratio: tuple[float, float],
        num_targets: int,
        min_keep: int,
    ) -> None:
        super().__init__(
            input_size=grid,
            patch_size=1,
            enc_mask_scale=context_scale,
            pred_mask_scale=target_scale,
            aspect_ratio=target_aspect_ratio,
            nenc=1,
            npred=num_targets,
            min_keep=min_keep,
        )
        del self._itr_counter  # shared between processes, which forbids a copy of the method
        for seed in range(256):
            generator = torch.Generator().manual_seed(seed)
            self._check(self._sample_block_size(generator, target_scale, target_aspect_ratio), "target")
            self._check(self._sample_block_size(generator, context_scale, (1.0, 1.0)), "context")

    def _check(self, block: tuple[int, int], what: str) -> None:
        if block[0] * block[1] <= self.min_keep:
            raise ValueError(
                f"I-JEPA's {what} blocks can be {block[0]}x{block[1]} patches on this {self.height}x{self.width} grid, "
                f"but must have more than min_keep={self.min_keep}: lower min_keep or raise {what}_scale."
            )

    def _sample_block_mask(
        self, b_size: tuple[int, int], acceptable_regions: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        self._check(b_size, "context" if acceptable_regions else "target")  # lightly would look for one forever
        return super()._sample_block_mask(b_size, acceptable_regions)

    def step(self) -> int:
        """Return the seed of the block sizes, which a whole batch shares."""
        return int(torch.randint(2**31, ()))

    def sample(self, batch_size: int, device: torch.device | str) -> tuple[Tensor, list[Tensor]]:
        """Draw the masks of a batch.

        Args:
            batch_size: Images.
            device: Where the masks go.

        Returns:
            Indices of the context patches (B, K), and per target block of its patches (B, M). No context patch is in a
            target, but where that would leave too few.
        """
        _, context, targets = self([0] * batch_size)
        return context[0].to(device), [target.to(device) for target in targets]


class IJEPA(MomentumMethod):
    """Image-based Joint-Embedding Predictive Architecture with the paper's recipe as defaults.

    A predictor gets the context patches' representations and the positions of a target block, and predicts what the
    momentum encoder makes of the target patches when it sees the whole image. The momentum encoder is exported. The
    paper has no class token: a backbone's class token goes through the encoder like a register, in training as in
    evaluation, and is neither predicted nor given to the predictor (``backbone_args: {class_token: false, global_pool:
    avg}`` leaves it out).

    Source: arXiv 2301.08243, section 3 and appendix A: batch 2048, learning rate 1e-3 after 15 of 600 epochs of
    warm-up, cosine to 1e-6, weight decay 0.04 to 0.4, momentum 0.996 to 1, predictor of width 384 and, for ViT-B, 6
    blocks; crops, no flips and ``min_keep`` as in the authors' configs. The momentum follows a cosine here, there a
    line.

    Args:
        predictor_dim: Width of the predictor.
        predictor_depth: Blocks of the predictor.
        predictor_num_heads: Attention heads of the predictor; the backbone's by default, as in the paper.
        context_scale: Range of the context block's area as a fraction of the image.
        target_scale: Range of a target block's area as a fraction of the image.
        target_aspect_ratio: Range of a target block's height over width.
        num_targets: Target blocks per image.
        min_keep: Every block keeps more patches than this.
        crop_scale: Range of the random crop's area as a fraction of the image.
        hflip_prob: Probability of a horizontal flip.
        backbone: Name of a timm ``VisionTransformer``.
        init_from: As in :class:`~nepa_plugin.methods.base.Method`.
        base_lr: As in the base.
        min_lr: As in the base.
        weight_decay: As in the base.
        final_weight_decay: As in the base.
        betas: As in the base.
        clip_grad_norm: As in the base; the paper does not clip.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.momentum.MomentumMethod`.

    Raises:
        ValueError: If the backbone is no ``VisionTransformer``, or the blocks do not fit the grid of patches.
    """

    exported = "teacher_backbone"

    def __init__(
        self,
        *args: Any,
        predictor_dim: int = 384,
        predictor_depth: int = 6,
        predictor_num_heads: int | None = None,
        context_scale: tuple[float, float] = (0.85, 1.0),
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect_ratio: tuple[float, float] = (0.75, 1.5),
        num_targets: int = 4,
        min_keep: int = 10,
        crop_scale: tuple[float, float] = (0.3, 1.0),
        hflip_prob: float = 0.0,
        backbone: str = "plain_vit_base_patch14_224",
        init_from: str | None = None,
        base_lr: float = 1.25e-4,
        min_lr: float = 1e-6,
        weight_decay: float = 0.04,
        final_weight_decay: float | None = 0.4,
        betas: tuple[float, float] = (0.9, 0.999),
        clip_grad_norm: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args,
            backbone=backbone,
            init_from=init_from,
            base_lr=base_lr,
            min_lr=min_lr,
            weight_decay=weight_decay,
            final_weight_decay=final_weight_decay,
            betas=betas,
            clip_grad_norm=clip_grad_norm,
            **kwargs,
        )
        vit = self.backbone
        check_maskable(vit, "I-JEPA")
        fix_position_embedding(vit, initialize=init_from is None)
        self.teacher_backbone.load_state_dict(vit.state_dict())
        self.masks = BlockMasks(
            vit.patch_embed.grid_size[0], context_scale, target_scale, target_aspect_ratio, num_targets, min_keep
        )
        self.predictor = IJEPAPredictorTIMM(
            num_patches=vit.patch_embed.num_patches,
            depth=predictor_depth,
            mlp_dim=vit.embed_dim,
            predictor_embed_dim=predictor_dim,
            num_heads=vit.blocks[0].attn.num_heads if predictor_num_heads is None else predictor_num_heads,
        )
        self.crop_scale = crop_scale
        self.hflip_prob = hflip_prob
        self.train_transform()  # a wrong option fails here
        self.save_hyperparameters(logger=False)

    def train_transform(self) -> Callable[[Image.Image], list[Tensor]]:
        """Return the authors' augmentation at this model's image size."""
        return SingleView(IJEPATransform, self.img_size, self.crop_scale, self.hflip_prob, self.normalize)

    def step(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the prediction loss of the one view (B, C, H, W), and the momentum encoder's features (B, D)."""
        images = views[0]
        context, targets = self.masks.sample(len(images), images.device)
        with torch.no_grad():
            tokens = self.teacher_backbone.forward_features(images)
        loss = F.smooth_l1_loss(self.predict(images, context, targets), self.targets(tokens, targets))
        return loss, self.pooled(tokens)

    def predict(self, images: Tensor, context: Tensor, targets: list[Tensor]) -> Tensor:
        """Predict target patches (B * targets, M, D), all images of the first block first, from context patches."""
        prefix = self.backbone.num_prefix_tokens
        encoded = masked_encoder(self.backbone).encode(images, idx_keep=with_prefix(context, prefix))
        return self.predictor(encoded[:, prefix:], context, targets)

    def targets(self, tokens: Tensor, targets: list[Tensor]) -> Tensor:
        """Return what is predicted: the momentum encoder's patches, each normalised over its features."""
        patches = tokens[:, self.backbone.num_prefix_tokens :]
        return apply_masks(F.layer_norm(patches, patches.shape[-1:]), targets)


transform = SingleView(IJEPATransform, crop_scale=(0.3, 1.0), hflip_prob=0.0)
