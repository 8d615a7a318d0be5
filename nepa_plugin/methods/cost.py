"""What a training step of a method costs, counted in one step of a copy."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nepa_plugin.methods.base import Method

#: Vectors of the sequence whose cost is counted where a backbone takes sequences.
SEQUENCE_TOKENS = 256
#: Parameters up to which a step is computed to be counted: FakeTensors cost a fraction of a millisecond per operation,
#: which for a network this small is five times as long as the operations themselves.
SMALL = 1_000_000
#: Numbers in a view up to which that is done: the counted attention's tables grow with the square of the tokens.
SMALL_VIEW = 3 * 32 * 32


@dataclass(frozen=True)
class TrainingCost:
    """Cost per image of the dataset and training step.

    Attributes:
        views: Augmented views made of an image.
        encoder_passes: Times an image or view goes through a backbone, the momentum one included.
        encoder_tokens: Tokens in these passes.
        gflops: Floating-point operations of forward and backward pass in 1e9, heads and decoders included, the online
            probe and the optimizer not. A multiplication and an addition are two. Attention is counted in full, also
            where it is causal.
        backbone_parameters: Parameters of the exported backbone.
        discarded_parameters: Trainable parameters outside the backbone, thrown away after pretraining.
    """

    views: int
    encoder_passes: float
    encoder_tokens: float
    gflops: float
    backbone_parameters: int
    discarded_parameters: int


@contextmanager
def _alone() -> Iterator[None]:
    """Let losses think that there is no other process: what has no values cannot be gathered."""
    initialized = torch.distributed.is_initialized
    torch.distributed.is_initialized = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_initialized = initialized


def _counted(
    method: Method, views: list[Tensor], batch_size: int, valueless: bool
) -> tuple[int, list[tuple[int, int]]]:
    """Return a step's floating-point operations, and (images, tokens) of every pass through a backbone."""
    method = copy.deepcopy(method).cpu().train()
    passes: list[tuple[int, int]] = []

    def count(module: Any, args: tuple[Tensor, ...]) -> None:
        passes.append((args[0].shape[0], args[0].shape[1]))

    for encoder in (method.backbone, getattr(method, "teacher_backbone", None)):
        if hasattr(encoder, "blocks"):
            encoder.blocks[0].register_forward_pre_hook(count)
    masks = [] if method.masks is None else [method.masks(batch_size)]
    with (
        _alone(),
        FakeTensorMode(allow_non_fake_inputs=True) if valueless else nullcontext(),
        # The fused CPU kernel is unknown to the counter; the plain one does the same arithmetic.
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        batch = [torch.randn(batch_size, *view.shape) for view in views]
        method.step(batch, *masks)[0].backward()
    return counter.get_total_flops(), passes


def training_cost(
    method: Method, batch_size: int = 4, sizes: Mapping[tuple[int, int], int] | None = None
) -> TrainingCost:
    """Count the cost of a training step of one process; the method and the random generators are left as they were.

    Nothing is computed, on torch's FakeTensors, which have a shape and no values; but for a small network on
    small images and for a method whose step looks at values, which take their step on the CPU.

    Args:
        method: A method that no trainer is attached to.
        batch_size: Images in the counted step. Losses that compare images grow with it, by little.
        sizes: How many images there are of each (height, width) in pixels, where they are trained on at their own
            sizes: the cost is the mean over them.

    Returns:
        The cost per image.
    """
    if sizes:
        shapes = {height * width: (height, width) for height, width in sizes}  # those of as many patches cost the same
        costs = {
            pixels: _cost(method, batch_size, method.train_transform(size))  # type: ignore[call-arg]
            for pixels, size in shapes.items()
        }
        parts = [(costs[height * width], count / sum(sizes.values())) for (height, width), count in sizes.items()]
        return replace(
            parts[0][0],
            encoder_tokens=sum(cost.encoder_tokens * part for cost, part in parts),
            gflops=sum(cost.gflops * part for cost, part in parts),
        )
    return _cost(method, batch_size, method.train_transform())


def _cost(method: Method, batch_size: int, transform: Callable[[Image.Image], list[Tensor]]) -> TrainingCost:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if hasattr(method.backbone, "input_dim"):  # it takes sequences, whose length is the data's
            views = [torch.zeros(SEQUENCE_TOKENS, method.backbone.input_dim)]
        else:
            views = transform(Image.new("RGB", (method.img_size, method.img_size), (90, 120, 150)))
        small = sum(p.numel() for p in method.parameters()) <= SMALL and max(v.numel() for v in views) <= SMALL_VIEW
        try:
            operations, passes = _counted(method, views, batch_size, valueless=not small)
        except (DataDependentOutputException, DynamicOutputShapeException):
            operations, passes = _counted(method, views, batch_size, valueless=False)
    backbone = {id(p) for p in method.backbone.parameters()}
    others = {id(p): p.numel() for _, p in method._own_parameters() if id(p) not in backbone}
    return TrainingCost(
        views=len(views),
        encoder_passes=sum(images for images, _ in passes) / batch_size,
        encoder_tokens=sum(images * tokens for images, tokens in passes) / batch_size,
        gflops=operations / batch_size / 1e9,
        backbone_parameters=sum(p.numel() for p in method.backbone.parameters()),
        discarded_parameters=sum(others.values()),
    )
