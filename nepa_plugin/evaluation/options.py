"""Options of an evaluation."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from nepa_plugin.checkpoints import Weights
from nepa_plugin.data.files import MAX_PIXELS
from nepa_plugin.data.transforms import CropMode
from nepa_plugin.evaluation.attentive import AttentiveOptions
from nepa_plugin.evaluation.features import Precision
from nepa_plugin.evaluation.finetune import FinetuneOptions
from nepa_plugin.evaluation.knn import Temperature
from nepa_plugin.evaluation.linear import LinearOptions
from nepa_plugin.runtime.ranges import NonNegativeInt, PositiveFraction, PositiveInt, Range, check_ranges

#: What torch, NumPy and Lightning take for a seed.
Seed = Annotated[int, Range(0, 2**32 - 1)]


@dataclass
class EvaluationOptions:
    """How a backbone is evaluated.

    Args:
        k: Neighbours of kNN.
        temperature: Of kNN's votes.
        depth: Depth whose features the probes read: ``embedding``, ``block 1`` ... or ``final norm``.
        pool: Feature of an image for kNN and linear: the ``class`` token, the ``last`` token, or the ``mean`` of the
            patch tokens.
        concat: Readout: number of depths whose features are put side by side.
        floor: Readout: score the same architecture untrained, too.
        untrained: Take the backbone's architecture with fresh weights.
        weights: Of a run folder of the published code: its ``average`` or its ``raw`` ones.
        model_args: Arguments of the model that override the backbone's own, such as ``attention`` or ``img_size``.
        crop_pct: Centre crop over resized side of the scored images; by default the model's own, 1 up to 64 pixels.
        crop_mode: ``center``, or ``squash``, which resizes both sides and loses the aspect ratio, as ViT-L was scored
            when it was published (with a ``crop_pct`` of 0.95).
        max_image_pixels: The most pixels that an image may have.
        batch_size: Images per device while features are extracted.
        num_workers: Loader processes per device; by default the cores, at most 16, and none up to two cores.
        accelerator: ``auto``, ``cuda`` or ``cpu``.
        devices: Number of devices, a list of GPU indices, or ``auto``.
        precision: ``bf16-mixed`` (autocast), ``32-true``, or ``auto``: bf16 on CUDA, float32 elsewhere.
        seed: Of everything random.
        cache: Keep features on disk, and use what is there.
        progress: Show progress bars.
        linear: The linear probe.
        attentive: The attentive probe.
        finetune: Fine-tuning.
    """

    k: PositiveInt = 20
    temperature: Temperature = 0.1
    depth: str = "final norm"
    pool: Literal["class", "last", "mean"] = "mean"
    concat: PositiveInt = 4
    floor: bool = False
    untrained: bool = False
    weights: Weights = "average"
    model_args: dict[str, Any] = field(default_factory=dict)
    crop_pct: PositiveFraction | None = None
    crop_mode: CropMode = "center"
    max_image_pixels: PositiveInt = MAX_PIXELS
    batch_size: PositiveInt = 256
    num_workers: NonNegativeInt | None = None
    accelerator: str = "auto"
    devices: int | str = 1
    precision: Precision = "auto"
    seed: Seed = 0
    cache: bool = True
    progress: bool = False
    linear: LinearOptions = field(default_factory=LinearOptions)
    attentive: AttentiveOptions = field(default_factory=AttentiveOptions)
    finetune: FinetuneOptions = field(default_factory=FinetuneOptions)

    def __post_init__(self) -> None:
        check_ranges(type(self), vars(self))
