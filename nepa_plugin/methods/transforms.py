"""lightly's transforms, built from a method's defaults and a user's options."""

import inspect
from collections.abc import Callable
from typing import Any

from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform

from nepa_plugin.predictor import NEPA_MEAN, NEPA_STD

#: Normalisation of this package's backbones, as lightly's transforms take it.
NORMALIZE = {"mean": list(NEPA_MEAN), "std": list(NEPA_STD)}


def build_transform(cls: Callable[..., Any], defaults: dict[str, Any], overrides: dict[str, Any] | None = None) -> Any:
    """Build a transform.

    Args:
        cls: The transform's class.
        defaults: The method's options of it.
        overrides: The user's options, which go first.

    Returns:
        The transform.

    Raises:
        ValueError: If an option of the user is none of the class's.
    """
    valid = list(inspect.signature(cls).parameters)
    if unknown := sorted(set(overrides or {}) - set(valid)):
        raise ValueError(
            f"transform_args: {getattr(cls, '__name__', cls)} has no option {', '.join(unknown)}; it has "
            f"{', '.join(valid)}."
        )
    return cls(**(defaults | (overrides or {})))


class BYOLViews(BYOLTransform):
    """BYOL's augmentation, which MoCo v3 uses too: two views, of which one is blurred and one solarised.

    Args:
        **options: Options of lightly's ``BYOLView1Transform``, for both views.
    """

    __signature__ = inspect.signature(BYOLView1Transform)

    def __init__(self, **options: Any) -> None:
        options = {"normalize": NORMALIZE} | options
        super().__init__(BYOLView1Transform(**options), BYOLView2Transform(**options))
