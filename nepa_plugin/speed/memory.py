"""How much memory a training step needs, counted on the CPU, and the largest batch that fits a GPU."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nepa_plugin.data.digits import digit_images
from nepa_plugin.methods import Method

GIB = 2**30


@dataclass(frozen=True)
class StepMemory:
    """What a training step keeps.

    Attributes:
        state_bytes: Independent of the batch: weights, gradients, AdamW's two moments, moving average, all float32.
        bytes_per_image: Tensors that the forward pass saves for the backward pass, and the images themselves. With
            gradient checkpointing: the blocks' inputs, and one block's tensors.
    """

    state_bytes: int
    bytes_per_image: int

    def bytes(self, batch_size: int) -> int:
        """Return the memory of a step in bytes."""
        return self.state_bytes + batch_size * self.bytes_per_image


def step_memory(method: Method, dtype: torch.dtype = torch.bfloat16, images: int = 2) -> StepMemory:
    """Count what a training step of a method saves; the method is left as it was.

    Every tensor that autograd saves is counted once, in a step under autocast. The count for ``images`` is taken from
    that for twice as many, so that what does not grow with the batch (copies of the weights in the lower precision)
    drops out. Norms run in float32, as autocast has it on CUDA but not on the CPU. It holds for the eager step; a
    compiled one saves less. Not counted: the allocator's fragmentation, the workspace of a kernel, the gradients of
    activations that live for a moment, DDP's buckets.

    Args:
        method: The method; no trainer is needed.
        dtype: The precision of autocast; ``torch.float32`` for none.
        images: Images in the smaller of the two steps.

    Returns:
        The memory.
    """
    saved = _growth(method, images, dtype)
    if method.backbone.grad_checkpointing:  # the backward pass holds one block at a time in full
        method.backbone.set_grad_checkpointing(False)
        try:
            saved += (_growth(method, images, dtype) - saved) // len(method.backbone.blocks)
        finally:
            method.backbone.set_grad_checkpointing()
    trainable = sum(p.nbytes for p in method.parameters() if p.requires_grad)
    weights = sum(p.nbytes for p in method.parameters())
    # weights and their average; gradient and two moments of what is trained
    state = weights * (2 if method.averaged else 1) + 3 * trainable
    return StepMemory(state, saved)


def _growth(method: Method, images: int, dtype: torch.dtype) -> int:
    few, many = (_saved_bytes(method, n, dtype) for n in (images, 2 * images))
    return (many - few) // images


def _saved_bytes(method: Method, images: int, dtype: torch.dtype) -> int:
    weights = {p.untyped_storage().data_ptr() for p in method.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no later tensor gets the same address
        # Nothing is kept in the graph: no backward pass follows, and an output that its own node refers to never dies.

    training, buffers = method.training, {name: value.clone() for name, value in method.named_buffers()}
    norms = [
        module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
        for module in method.modules()
        if isinstance(module, nn.LayerNorm)
    ]
    with torch.random.fork_rng(devices=[]):
        transform = method.train().train_transform()
        samples = [transform(image.convert("RGB")) for image in digit_images(256)[0][:images]]
        views = [torch.stack(view) for view in zip(*samples, strict=True)]
        for view in views:
            keep(view)
        with (
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing),
        ):
            method.step(views)
    for hook in norms:
        hook.remove()
    for name, value in method.named_buffers():
        value.copy_(buffers[name])
    method.train(training)
    return sum(storage.nbytes() for storage in kept.values())


def largest_batch(memory: StepMemory, gpu_bytes: int, reserve: float = 0.1) -> int:
    """Return the largest batch per GPU.

    Args:
        memory: What a step needs.
        gpu_bytes: Memory of the GPU.
        reserve: Fraction left for the context, the libraries' workspaces and fragmentation.

    Returns:
        Images; 0 if not even the state fits.
    """
    return max(0, int((gpu_bytes * (1 - reserve) - memory.state_bytes) // memory.bytes_per_image))
