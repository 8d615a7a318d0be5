"""The timm names ``nepa_sequence_*``: NEPA's transformer over vectors that are not patches."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor

from nepa_plugin.models.names import MODEL_SIZES, default_cfg
from nepa_plugin.predictor import NepaViT

SEQUENCE_SIZES = ("tiny", "small", "base")


class EmbeddingSequence(NepaViT):
    """NEPA over sequences of vectors: features of a CNN, of tiles of a slide, frames of audio, samples of a signal.

    A linear layer takes the place of the patch embedding. Everything else is :class:`~nepa_plugin.predictor.NepaViT`,
    whose ``set_attention``, ``save_backbone`` and ``load_backbone`` work here, too.

    Args:
        input_dim: Length of a vector.
        **kwargs: Arguments of :class:`~nepa_plugin.predictor.NepaViT`; what is about the size of images has no effect.
            ``rope_rescale_coords`` is 1 by default: that augmentation is published for images.

    Raises:
        ValueError: As there.

    Example:
        >>> model = timm.create_model("nepa_sequence_tiny", input_dim=80)
        >>> frames, lengths = torch.randn(4, 200, 80), torch.tensor([200, 150, 90, 120])
        >>> padding = torch.arange(200) >= lengths[:, None]
        >>> embeddings, predictions = model.predict_next(frames, padding=padding)
        >>> loss = NextEmbeddingLoss()(embeddings, predictions, model.valid(padding))
    """

    def __init__(self, input_dim: int, **kwargs: Any) -> None:
        if input_dim < 1:
            raise ValueError(f"input_dim={input_dim}: a vector has at least one number.")
        if kwargs.get("order", "raster") != "raster":
            raise ValueError(f"order={kwargs['order']!r}: a sequence is read as it comes.")
        # To timm a sequence is an image of one row, and its linear layer a convolution of one pixel.
        image = {"img_size": 1, "patch_size": 1, "in_chans": input_dim, "dynamic_img_size": True}
        super().__init__(**({"rope_rescale_coords": 1.0} | kwargs | image))
        self.input_dim = input_dim

    def project(self, sequences: Tensor) -> Tensor:
        """Return the vectors (B, T, D) of sequences (B, T, input_dim), in the model's width, without the class token.

        Raises:
            ValueError: If the sequences have another shape.
        """
        if sequences.ndim != 3 or sequences.shape[-1] != self.input_dim:
            raise ValueError(f"Expected sequences (B, T, {self.input_dim}), got {tuple(sequences.shape)}.")
        layer = self.patch_embed.proj
        return F.linear(sequences, layer.weight.flatten(1), layer.bias)

    def _embed(self, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[int, int]]:
        embeddings, rope, _ = self._sequence(self.project(images), None, None)
        return embeddings, rope, None, (1, images.shape[1])

    def predict_next(  # type: ignore[override]  # the sequences stand where images are
        self, sequences: Tensor, *, positions: Tensor | None = None, padding: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the input embeddings and, for each, the prediction of the next one.

        Args:
            sequences: Vectors (B, T, input_dim).
            positions: As :meth:`~nepa_plugin.predictor.NepaViT.predict_next` takes them.
            padding: True where a sequence has nothing, (B, T); whatever stands there has no effect elsewhere.

        Returns:
            ``(embeddings, predictions)``, each (B, 1 + T, D), class token first.

        Raises:
            ValueError: If a shape is wrong.
        """
        if padding is not None and padding.shape == sequences.shape[:2] and padding.dtype == torch.bool:
            sequences = sequences.masked_fill(padding[:, :, None], 0.0)  # no infinity may reach the linear layer
        return super().predict_next(embeddings=self.project(sequences), positions=positions, padding=padding)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: timm's would place the elements as patches of an image.

        Raises:
            ValueError: Always.
        """
        raise ValueError("A model of sequences has no intermediate features here: hooks on its blocks give them.")

    def valid(self, padding: Tensor) -> Tensor:
        """Return which embeddings (B, 1 + T) are no padding (B, T), as the loss takes it."""
        return F.pad(~padding, (self.num_prefix_tokens, 0), value=True)

    def forward_features(self, x: Tensor, padding: Tensor | None = None, positions: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Return all tokens (B, 1 + T, D) after the final norm, class token first, of sequences (B, T, input_dim)."""
        return self.predict_next(x, positions=positions, padding=padding)[1]

    def forward(self, x: Tensor, padding: Tensor | None = None, positions: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Return the head's output of sequences (B, T, input_dim); of a model without a head, all tokens."""
        return self.forward_head(self.forward_features(x, padding, positions))


def _register(size: str) -> str:
    name = f"nepa_sequence_{size}"

    def create(pretrained: bool = False, **kwargs: Any) -> EmbeddingSequence:
        model: EmbeddingSequence = build_model_with_cfg(
            EmbeddingSequence, name, pretrained, **(MODEL_SIZES[size]._asdict() | kwargs)
        )
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"EmbeddingSequence, {size}; needs ``input_dim``."
    register_model(create)
    return name


#: timm looks for this name in the module of a registered function.
default_cfgs = generate_default_cfgs({f"nepa_sequence_{size}": default_cfg() for size in SEQUENCE_SIZES})
for _size in SEQUENCE_SIZES:
    _register(_size)
