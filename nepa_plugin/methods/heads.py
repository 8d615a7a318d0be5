"""Projection and prediction heads."""

import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from lightly.models.modules.heads import DINOProjectionHead, SimSiamPredictionHead
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class PrototypeHead(DINOProjectionHead):
    """lightly's head of DINO and iBOT, with a weight-normalised last layer that can be copied.

    lightly normalises with ``torch.nn.utils.weight_norm``, and a module with that cannot be deep-copied. The cosines to
    the prototypes are computed in float32 under autocast, too: temperatures of 0.04 to 0.1 divide them, and bfloat16
    has steps of 0.004 near 1. Source: DINO, arXiv 2104.14294, appendix C.

    Args:
        input_dim: D of the features.
        hidden_dim: Width of the MLP.
        bottleneck_dim: Width of the unit vectors that the prototypes are compared with.
        output_dim: Number of prototypes.
        norm_last_layer: Keep the prototypes at unit length.
        freeze_last_layer: Epochs in which ``cancel_last_layer_gradients`` keeps the prototypes as they are.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        output_dim: int = 65536,
        norm_last_layer: bool = True,
        freeze_last_layer: int = -1,
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the layer that is replaced below
            super().__init__(input_dim, hidden_dim, bottleneck_dim, output_dim, freeze_last_layer=freeze_last_layer)
        self.last_layer = parametrizations.weight_norm(nn.Linear(bottleneck_dim, output_dim, bias=False))
        length = self.last_layer.parametrizations.weight.original0
        length.data.fill_(1)
        length.requires_grad_(not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, output_dim) of features (N, input_dim), in float32."""
        x = self.layers(x)
        with torch.autocast(device_type=x.device.type, enabled=False):
            logits: Tensor = self.last_layer(F.normalize(x.float(), dim=-1))
        return logits


HeadKind = Literal["none", "mlp", "simsiam"]


class TokenHeads(nn.Module):
    """Predictions of the next embeddings of every token, as wide as the tokens: hidden layers, and an output per place.

    Args:
        kind: ``"mlp"``: Linear, LayerNorm and GELU twice, then Linear. ``"simsiam"``: SimSiam's prediction head with
            its bottleneck of a quarter of the width and BatchNorm over all tokens of the batch (arXiv 2011.10566).
            ``"none"``: no hidden layer, and the first place reads the tokens as they are.
        dim: Width of a token, D.
        places: Places ahead. The hidden layers are shared, so that a further place costs one linear layer.

    Raises:
        ValueError: If there is no such kind.
    """

    def __init__(self, kind: HeadKind, dim: int, places: int = 1) -> None:
        super().__init__()
        self.hidden: nn.Module = nn.Identity()
        first: nn.Module = nn.Identity()
        if kind == "mlp":
            hidden = [layer for _ in range(2) for layer in (nn.Linear(dim, dim), nn.LayerNorm(dim), nn.GELU())]
            self.hidden, first = nn.Sequential(*hidden), nn.Linear(dim, dim)
        elif kind == "simsiam":
            *hidden, first = SimSiamPredictionHead(dim, max(1, dim // 4), dim).layers
            self.hidden = nn.Sequential(*hidden)
        elif kind != "none":
            raise ValueError(f"predictor_head={kind!r} is none of none, mlp and simsiam.")
        width = first.in_features if isinstance(first, nn.Linear) else dim
        self.places = nn.ModuleList([first, *(nn.Linear(width, dim) for _ in range(places - 1))])

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Return the predictions (B, T, D) of each place of tokens (B, T, D)."""
        hidden = self.hidden(tokens.flatten(0, 1))  # BatchNorm takes (N, D)
        return [place(hidden).view_as(tokens) for place in self.places]
