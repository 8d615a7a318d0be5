"""Base of the methods that read the patches in raster order with NEPA's causal transformer."""

from collections.abc import Callable
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from nepa_plugin.data.transforms import NEPATransform
from nepa_plugin.methods.base import Method
from nepa_plugin.predictor import NepaViT
from nepa_plugin.runtime.ranges import Fraction, Scale


class CausalMethod(Method):
    """One view by a random crop and flip, and a :class:`~nepa_plugin.predictor.NepaViT` that is trained on it.

    Args:
        attention: ``"causal"``, or ``"bidirectional"`` (an ablation).
        crop_scale: Range of the random crop's area as a fraction of the image.
        hflip_prob: Probability of a horizontal flip.
        **kwargs: Arguments of :class:`~nepa_plugin.methods.base.Method`.

    Raises:
        ValueError: If the backbone is not a ``nepa_vit_*`` model, or sizes do not fit.
    """

    #: The method's name in errors.
    title: ClassVar[str]
    #: Whether the step takes sequences of vectors, too, with their lengths.
    takes_sequences: ClassVar[bool] = False
    #: Whether the patches may be read in another order than the raster's.
    takes_orders: ClassVar[bool] = False
    #: Whether batches may be of images of any size, all of one batch alike.
    takes_native_sizes: ClassVar[bool] = False

    def __init__(
        self,
        *args: Any,
        attention: str = "causal",
        crop_scale: Scale = (0.08, 1.0),
        hflip_prob: Fraction = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.backbone.set_attention(attention)
        self.backbone.set_predicts(False)  # what is compared with the loss's targets comes from a head of the method
        self.crop_scale = crop_scale
        self.hflip_prob = hflip_prob

    def prepare_backbone(self, loaded: bool) -> None:
        """Check that the backbone reads patches one after the other."""
        if not isinstance(self.backbone, NepaViT):
            raise ValueError(
                f"{self.title} needs a nepa_vit_* backbone: its predictions come from a causal transformer."
            )
        if self.backbone.order != "raster" and not self.takes_orders:
            raise ValueError(f"{self.title} reads patches in raster order: NEPA and CPC take others.")
        if hasattr(self.backbone, "input_dim") and not self.takes_sequences:
            raise ValueError(f"{self.title} trains on images alone: take a nepa_vit_* backbone, or NEPA.")

    def train_transform(self, size: tuple[int, int] | None = None) -> Callable[[Image.Image], list[Tensor]]:
        """Return NEPA's published kind of augmentation.

        Args:
            size: (height, width) of the view in pixels; by default the model's image size.
        """
        return NEPATransform(size or self.img_size, self.crop_scale, self.hflip_prob, self.mean, self.std)
