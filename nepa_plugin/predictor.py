"""The NEPA predictor: a causal Vision Transformer on timm's ``Eva``.

Architecture: NEPA, arXiv 2512.16922, section 3. Everything except the attention mode, the affine-free QK-norm, the
initialisation and the joint (embeddings, predictions) forward pass is timm's.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models._input import update_model_args
from timm.models._manipulate import checkpoint
from timm.models.eva import Eva
from torch import Tensor, nn

from nepa_plugin.features import ImageFeatures
from nepa_plugin.order import check_order, in_order
from nepa_plugin.rope import ResidentRope, as_coordinates

AttentionMode = Literal["causal", "bidirectional"]
Activation = Literal["gelu", "silu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "silu": nn.SiLU}
PositionEmbedding = Literal["rope", "absolute"]
POSITION_EMBEDDINGS: tuple[str, ...] = ("rope", "absolute")
ATTENTION_MODES: tuple[str, ...] = ("causal", "bidirectional")
NEPA_MEAN = NEPA_STD = (0.5, 0.5, 0.5)


def _norm_layer(dim: int, **kwargs: Any) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=1e-12, **kwargs)


class NepaViT(ImageFeatures, Eva):
    """Vision Transformer that predicts the next patch's embedding.

    A timm ``Eva`` in the published NEPA configuration: class token first, axial RoPE with train-time rescaling of the
    patch coordinates, QK-norm without affine parameters, LayerScale, a final LayerNorm, and no absolute position
    embedding. Source: arXiv 2512.16922.

    Args:
        img_size: Image size in pixels, one number or (height, width). Every side must be divisible by the patch size
            unless ``dynamic_img_pad`` or ``dynamic_img_resize`` is set.
        patch_size: Patch size in pixels, one number or (height, width).
        in_chans: Number of image channels.
        num_classes: Outputs of the classification head; 0 for none. With a head, the patch tokens of the final norm's
            output are averaged, normalised and mapped linearly, as in the published fine-tuning.
        global_pool: timm pooling name, or ``"last"`` for the last token, which the published classifiers without a
            pooling layer read. Default: ``""`` (all tokens) without a head, ``"avg"`` with one.
        embed_dim: Token dimension D.
        depth: Number of transformer blocks.
        num_heads: Number of attention heads.
        mlp_ratio: Hidden size of the MLP over ``embed_dim``.
        swiglu_mlp: Gated MLP.
        mlp_act: Activation of the MLP or its gate, ``"gelu"`` or ``"silu"``. Default: SiLU with a gate, GELU without.
        attention: ``"causal"`` or ``"bidirectional"``; :meth:`set_attention` switches it later.
        order: In which order the patches are read, and so what causal attention sees and what is predicted next:
            ``"raster"``, as published, or another of :data:`~nepa_plugin.order.PATCH_ORDERS`; ``"random:SEED"`` is a
            fixed one, ``"random"`` a new one for every image in training, and that of seed 0 elsewhere.
        qk_norm: Normalise queries and keys per head. The published checkpoints do.
        qk_norm_affine: Give QK-norm a learned weight (no bias), as the published fine-tuned checkpoints have, and the
            pretrained ViT-L.
        init_values: Initial value of LayerScale; 0 for none, as where it is folded into the weights.
        position_embedding: ``"rope"``, as published, or ``"absolute"``, a learned vector per place that is added to the
            transformer's input and not to what is predicted (an ablation).
        rope_temperature: Base of the RoPE periods.
        rope_rescale_coords: In training mode the patch coordinates are multiplied by a factor drawn log-uniformly
            from [1/r, r], once per forward pass. 1 turns this off.
        predicts: Whether the outputs are predictions of embeddings. It changes nothing in the model; a training whose
            head between outputs and loss is thrown away turns it off, so that nothing takes its outputs for some.
        use_fc_norm: LayerNorm between pooling and head. Default: only with a head that does not read the last token.
        dynamic_img_size: Accept any image size divisible by the patch size.
        dynamic_img_pad: Pad images at the bottom and right to the next multiple of the patch size.
        dynamic_img_resize: Resize images bilinearly to the next multiple of the patch size.
        **kwargs: Further arguments of ``timm.models.eva.Eva`` (``drop_path_rate``, ``proj_drop_rate``, ...).

    Raises:
        ValueError: On an unknown attention mode or activation, or an image size that the patch size does not divide.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 14,
        in_chans: int = 3,
        num_classes: int = 0,
        global_pool: str | None = None,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        swiglu_mlp: bool = False,
        mlp_act: Activation | None = None,
        attention: AttentionMode = "causal",
        order: str = "raster",
        qk_norm: bool = True,
        qk_norm_affine: bool = False,
        init_values: float = 1e-5,
        position_embedding: PositionEmbedding = "rope",
        rope_temperature: float = 100.0,
        rope_rescale_coords: float = 2.0,
        predicts: bool = True,
        use_fc_norm: bool | None = None,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        dynamic_img_resize: bool = False,
        **kwargs: Any,
    ) -> None:
        if attention not in ATTENTION_MODES:
            raise ValueError(f"attention={attention!r} is not one of {ATTENTION_MODES}.")
        if mlp_act is not None and mlp_act not in ACTIVATIONS:
            raise ValueError(f"mlp_act={mlp_act!r} is not one of {tuple(ACTIVATIONS)}.")
        check_order(order)
        if position_embedding not in POSITION_EMBEDDINGS:
            raise ValueError(f"position_embedding={position_embedding!r} is not one of {POSITION_EMBEDDINGS}.")
        if embed_dim % (4 * num_heads):
            raise ValueError(
                f"embed_dim={embed_dim} must be a multiple of 4 x num_heads={num_heads}: axial RoPE rotates pairs of "
                "channels along two axes."
            )
        any_size = dynamic_img_pad or dynamic_img_resize
        if global_pool is None:
            global_pool = "avg" if num_classes else ""
        if not any_size:
            _check_divisible(to_2tuple(img_size), to_2tuple(patch_size))
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool="" if global_pool == "last" else global_pool,  # Eva has no such pooling
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            swiglu_mlp=swiglu_mlp,
            attn_type="rope",
            qk_norm=qk_norm,
            init_values=init_values or None,
            use_abs_pos_emb=position_embedding == "absolute",
            use_rot_pos_emb=position_embedding == "rope",
            rope_type="dinov3",
            rope_temperature=rope_temperature,
            rope_rotate_half=True,
            rope_rescale_coords=rope_rescale_coords,
            norm_layer=_norm_layer,
            use_post_transformer_norm=True,
            use_fc_norm=num_classes > 0 and global_pool != "last" if use_fc_norm is None else use_fc_norm,
            dynamic_img_size=dynamic_img_size or any_size,
            dynamic_img_pad=dynamic_img_pad,
            head_init_scale=0.0,  # the published head starts at zero, see init_weights
            **kwargs,
        )
        self.global_pool = global_pool
        self.dynamic_img_resize = dynamic_img_resize
        #: Depth and pooling that :meth:`~nepa_plugin.features.ImageFeatures.extract_features` reads by default.
        self.best_feature = ("final norm", "mean")
        self.attention: str = attention
        self.order = order
        self.predicts = predicts
        self.register_buffer("_own_order", self._order_of(self.patch_embed.grid_size), persistent=False)
        if self.rope is not None:
            self.rope.__class__ = ResidentRope  # Eva builds its RoPE by a name, and there is none for a class of ours
        dd = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        for block in self.blocks:
            if mlp_act is not None:
                block.mlp.act = ACTIVATIONS[mlp_act]()
            if not qk_norm:
                continue
            # Eva's QK-norm has weight and bias; the published one has neither, or (fine-tuned) a weight only.
            for name in ("q_norm", "k_norm"):
                norm = nn.LayerNorm(
                    embed_dim // num_heads, eps=1e-12, elementwise_affine=qk_norm_affine, bias=False, **dd
                )
                setattr(block.attn, name, norm)

    # -- initialisation: published, not Eva's --------------------------------------------------------------------------

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as published: weights truncated normal with standard deviation 0.02, biases and head zero."""
        super().init_weights(needs_reset)
        if isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def _init_weights(self, m: nn.Module, needs_reset: bool = True) -> None:
        if isinstance(m, nn.Conv2d):  # Eva leaves the patch embedding at PyTorch's default
            trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        else:
            super()._init_weights(m, needs_reset)

    def fix_init_weight(self) -> None:
        """Do nothing: Eva rescales its projections by depth, the published initialisation does not."""

    # -- attention mode ------------------------------------------------------------------------------------------------

    def set_attention(self, attention: AttentionMode) -> "NepaViT":
        """Switch the attention of a built model; the weights stay as they are.

        Args:
            attention: ``"causal"`` or ``"bidirectional"``.

        Returns:
            The model itself.

        Raises:
            ValueError: On any other mode.
        """
        if attention not in ATTENTION_MODES:
            raise ValueError(f"attention={attention!r} is not one of {ATTENTION_MODES}.")
        self.attention = attention
        update_model_args(self, attention=attention)  # so that an exported folder rebuilds this mode
        return self

    def set_predicts(self, predicts: bool) -> None:
        """Say whether the outputs are predictions of embeddings, also in what is exported."""
        if predicts != self.predicts:
            self.predicts = predicts
            update_model_args(self, predicts=predicts)

    def check_predicts(self) -> None:
        """Raise ``ValueError`` if the outputs are no predictions of embeddings."""
        if not self.predicts:
            raise ValueError(
                "This backbone's outputs are no predictions of embeddings: a head between them and the loss was thrown "
                "away after pretraining."
            )

    # -- forward passes ------------------------------------------------------------------------------------------------

    def _prepare(self, images: Tensor) -> Tensor:
        """Check the image, and resize it if that was asked for."""
        patch_embed = self.patch_embed
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(
                f"Expected images of shape (B, {self.in_chans}, H, W), got {tuple(images.shape)}. "
                "Build the model with in_chans= to change the number of channels."
            )
        size, patch = images.shape[-2:], patch_embed.patch_size
        if self.dynamic_img_resize:
            target = [math.ceil(s / p) * p for s, p in zip(size, patch, strict=True)]
            if list(size) != target:
                images = F.interpolate(images, size=target, mode="bilinear", antialias=True)
        elif self.dynamic_img_size:
            if not patch_embed.dynamic_img_pad:
                _check_divisible(size, patch)
        elif tuple(size) != tuple(patch_embed.img_size):
            raise ValueError(
                f"The model was built for images of {tuple(patch_embed.img_size)} pixels, got {tuple(size)}. Build it "
                "with img_size=, call set_input_size(), or build it with dynamic_img_size=True."
            )
        return images

    def _embed(self, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[int, int]]:
        """Return the input embeddings (B, T, D) in raster order, before any dropout, and where they are.

        Which is the RoPE table (N, 2 * head_dim), or what is to be added to them, (1, T, D) or (1, N, D); and the grid.
        """
        patches, rope, places = self.patch_embed(self._prepare(images)), None, self.pos_embed
        grid = tuple(self.patch_embed.grid_size)
        if self.dynamic_img_size:
            grid = tuple(patches.shape[1:3])
            if self.rope is not None:
                rope = self.rope.get_embed(shape=list(grid))
            else:
                prefix = 0 if self.no_embed_class else self.num_prefix_tokens
                places = resample_abs_pos_embed(
                    places, new_size=list(grid), old_size=self.patch_embed.grid_size, num_prefix_tokens=prefix
                )
            patches = patches.flatten(1, 2)
        elif self.rope is not None:
            rope = self.rope.get_embed()
        if self.cls_token is None:
            return patches, rope, places, grid
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1), rope, places, grid

    def embed(self, images: Tensor) -> Tensor:
        """Return the input embeddings z: class token, then one embedding per patch in raster order.

        Args:
            images: Normalised images (B, C, H, W).

        Returns:
            Embeddings (B, T, D) with T = 1 + number of patches.
        """
        return self._embed(images)[0]

    def _sequence(
        self, embeddings: Tensor, positions: Tensor | None, padding: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return embeddings with the class token, their RoPE table, and the mask of what may be attended to, if any."""
        if embeddings.ndim != 3 or embeddings.shape[-1] != self.embed_dim:
            raise ValueError(f"Expected embeddings (B, T, {self.embed_dim}), got {tuple(embeddings.shape)}.")
        batch, length, _ = embeddings.shape
        mask = None
        if padding is not None:
            if padding.shape != (batch, length) or padding.dtype != torch.bool:
                raise ValueError(f"Expected padding as booleans ({batch}, {length}), got {tuple(padding.shape)}.")
            # Whatever stands in padding, not a number included, must not reach a sum.
            embeddings = embeddings.masked_fill(padding[:, :, None], 0.0)
            seen = ~padding
            if self.cls_token is not None:
                seen = torch.cat([seen.new_ones(batch, 1), seen], dim=1)
            mask = seen[:, None, None, :]
            if self.is_causal:  # a kernel is causal or takes a mask; and every element sees itself, padding too
                before = torch.ones(seen.shape[1], seen.shape[1], dtype=torch.bool, device=seen.device).tril()
                mask = before & (mask | torch.eye(seen.shape[1], dtype=torch.bool, device=seen.device))
        if self.rope is None:
            raise ValueError("Sequences need RoPE: absolute positions are those of an image's patches.")
        rope = self.rope.table_at(as_coordinates(positions, batch, length, embeddings.device))
        if self.cls_token is not None:
            embeddings = torch.cat([self.cls_token.expand(batch, -1, -1), embeddings], dim=1)
        return embeddings, rope, mask

    def predict_next(
        self,
        images: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        positions: Tensor | None = None,
        padding: Tensor | None = None,
        masked: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the input embeddings and, for each, the prediction of the next one.

        ``predictions[:, t]`` predicts ``embeddings[:, t + 1]``; the class token's output predicts the first patch and
        the last output predicts nothing. Patches stand in the order in which they are read.

        Args:
            images: Normalised images (B, C, H, W).
            embeddings: In place of images, any sequence of vectors of the model's width, (B, T, D), without the class
                token.
            positions: Where the vectors are, in patches: on a line (T,) or (B, T), or in a plane (T, 2) or (B, T, 2).
                Neighbours are as far apart as the patches of a 16x16 grid. By default on a line, one after the other.
            padding: True where a sequence has nothing, (B, T). No output elsewhere depends on what is there, and
                :class:`~nepa_plugin.loss.NextEmbeddingLoss` leaves it out with ``valid``.
            masked: True where the transformer sees ``mask_token`` (1, 1, D) in place of a patch, (B, N); the embeddings
                that are returned are the patches' (an ablation).
            mask_token: What it sees there.

        Returns:
            ``(embeddings, predictions)``, z and z-hat of the paper, each (B, T, D), class token first. The embeddings
            are those before any dropout and are not detached.

        Raises:
            ValueError: If neither or both of images and embeddings are given, they do not fit the model, or patch
                dropout is on in training mode.
        """
        if (images is None) == (embeddings is None):
            raise ValueError("predict_next takes either images or embeddings.")
        if self.patch_drop is not None and self.training:
            raise ValueError("predict_next needs every patch: build the model with patch_drop_rate=0.")
        if images is not None:
            if positions is not None or padding is not None:
                raise ValueError("predict_next: positions and padding go with embeddings, not with images.")
            (embeddings, rope, places, grid), mask = self._embed(images), None
            order = self._drawn_order(len(images), grid, embeddings.device)
            if order is not None:
                embeddings, places = self._patches_in(order, embeddings), self._patches_in(order, places)
                rope = rope if rope is None else in_order(rope, order)
                rope = rope[:, None] if rope is not None and rope.ndim == 3 else rope
                masked = masked if masked is None else masked.gather(1, order.expand_as(masked))
        else:
            assert embeddings is not None
            (embeddings, rope, mask), places = self._sequence(embeddings, positions, padding), None
        x = embeddings
        if masked is not None:
            if mask_token is None or masked.shape != (len(x), x.shape[1] - self.num_prefix_tokens):
                raise ValueError("predict_next: masked, one boolean per patch, goes with a mask_token.")
            hidden = F.pad(masked, (self.num_prefix_tokens, 0), value=False)
            x = torch.where(hidden[:, :, None], mask_token.to(x.dtype), x)
        if places is not None:
            x = x + (F.pad(places, (0, 0, self.num_prefix_tokens, 0)) if self.no_embed_class else places)
        x = self.norm_pre(self.pos_drop(x))
        attention = {"attn_mask": mask, "is_causal": self.is_causal and mask is None}
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, rope=rope, **attention)
            else:
                x = block(x, rope=rope, **attention)
        return embeddings, self.norm(x)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool | None = None) -> Tensor:
        """Return all tokens after the final norm.

        Args:
            x: Normalised images (B, C, H, W).
            attn_mask: Optional attention mask, timm's.
            is_causal: Overrides the model's attention mode for this call.

        Returns:
            Tokens (B, T, D), class token first, then the patches in raster order, in whatever order they are read.
        """
        x = self._prepare(x)
        return super().forward_features(x, **self._attention(x, attn_mask, is_causal))

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Return tokens (B, T, D) pooled: timm's ways, and ``"last"``."""
        if (self.global_pool if pool_type is None else pool_type) == "last":
            return self.last_token(x)
        return super().pool(x, pool_type)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool | None = None) -> Tensor:
        """Return the head's output: tokens (B, T, D), pooled features (B, D) or logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x, attn_mask=attn_mask, is_causal=is_causal))

    def forward_intermediates(  # type: ignore[override]
        self, x: Tensor, *args: Any, attn_mask: Tensor | None = None, is_causal: bool | None = None, **kwargs: Any
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """``Eva.forward_intermediates`` in the model's attention mode (timm's arguments and return values)."""
        x = self._prepare(x)
        kwargs |= self._attention(x, attn_mask, is_causal)
        return super().forward_intermediates(x, *args, **kwargs)  # type: ignore[return-value]

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Tensor]:
        """Return outputs of chosen blocks, with the signature of timm's and DINO's ``VisionTransformer``.

        Args:
            x: Normalised images (B, C, H, W).
            n: The last n blocks, or the indices of the blocks.
            reshape: Return (B, D, H / p, W / p) maps instead of (B, N, D) patch tokens.
            return_prefix_tokens: Return (patch tokens, class token) pairs.
            norm: Apply the final norm to each output.

        Returns:
            One tensor (or pair) per block, in order of depth.
        """
        outputs = self.forward_intermediates(
            x,
            n if isinstance(n, int) else list(n),
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            stop_early=True,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )
        assert isinstance(outputs, list)
        return outputs

    # -- adaptation ----------------------------------------------------------------------------------------------------

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head as timm does; a model built without a head also gets the published pooling and norm."""
        if num_classes > 0 and self.num_classes == 0 and global_pool is None and self.global_pool == "":
            global_pool = "avg"
            if isinstance(self.fc_norm, nn.Identity):
                weight = self.norm.weight
                self.fc_norm = _norm_layer(self.embed_dim, device=weight.device, dtype=weight.dtype)
        super().reset_classifier(num_classes, "" if global_pool == "last" else global_pool)
        self.global_pool = self.global_pool if global_pool is None else global_pool
        # the norm stays when a head is removed, though by default it is built only with one
        update_model_args(self, use_fc_norm=isinstance(self.fc_norm, nn.LayerNorm))
        if isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change image and patch size of a built model; timm resamples the patch embedding.

        Args:
            img_size: New image size in pixels; ``None`` keeps it.
            patch_size: New patch size in pixels; ``None`` keeps it.

        Raises:
            ValueError: If the patch size does not divide the image size.
        """
        patch_embed: PatchEmbed = self.patch_embed
        new_img = to_2tuple(img_size or patch_embed.img_size)
        new_patch = to_2tuple(patch_size or patch_embed.patch_size)
        if not (patch_embed.dynamic_img_pad or self.dynamic_img_resize):
            _check_divisible(new_img, new_patch)
        super().set_input_size(new_img, new_patch if patch_size is not None else None)
        if self.order != "raster":
            self.set_order(self.order)


def _check_divisible(img_size: Sequence[int], patch_size: Sequence[int]) -> None:
    if any(s % p or s < p for s, p in zip(img_size, patch_size, strict=True)):
        nearest = tuple(max(p, round(s / p) * p) for s, p in zip(img_size, patch_size, strict=True))
        raise ValueError(
            f"Image size {tuple(img_size)} is not divisible by patch size {tuple(patch_size)}; the nearest size that "
            f"is: {nearest}. Change img_size or patch_size, or ask for dynamic_img_pad=True or dynamic_img_resize=True."
        )
