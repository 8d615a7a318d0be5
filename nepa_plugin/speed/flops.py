"""Arithmetic: what a training step of a ViT needs, and what the device can do."""

import time

import torch


def vit_training_flops(
    embed_dim: int,
    depth: int,
    patches: int,
    patch_pixels: int,
    prefix_tokens: int = 1,
    mlp_ratio: float = 4.0,
    mlp_matrices: int = 2,
) -> float:
    """Return the floating-point operations of forward and backward pass of a ViT, per image.

    A multiplication and an addition are two. Per token and block the projections hold 4 D^2 weights and the MLP
    ``mlp_matrices`` x r x D^2; attention is two products of T x T x D, counted in full also where it is causal (fused
    kernels skip about half of it). The backward pass is twice the forward pass, except at the patch embedding, whose
    input needs no gradient. Norms, activations and the loss are left out, as is usual.

    Args:
        embed_dim: Token dimension D.
        depth: Number of blocks.
        patches: Patches per image.
        patch_pixels: Values per patch, channels included.
        prefix_tokens: Tokens beside the patches.
        mlp_ratio: Hidden size of the MLP over D.
        mlp_matrices: 2 for the usual MLP, 3 for a gated one.

    Returns:
        Operations per image.
    """
    tokens = patches + prefix_tokens
    weights = (4 + mlp_matrices * mlp_ratio) * embed_dim**2
    block = 2 * tokens * weights + 2 * (2 * tokens**2 * embed_dim)
    return 3 * depth * block + 2 * (2 * patches * patch_pixels * embed_dim)


def matrix_peak(device: torch.device, dtype: torch.dtype, size: int | None = None, repeats: int = 20) -> float:
    """Measure the largest rate of matrix multiplication.

    Args:
        device: Where.
        dtype: ``torch.bfloat16``, ``torch.float16`` or ``torch.float32``.
        size: Rows and columns; by default 8192 on CUDA. On the CPU the best of 512, 1024 and 2048 counts, and sizes end
            where a product would take over a quarter of a second: bfloat16 without instructions for it is that slow.
        repeats: Products of each size, of which the fastest counts.

    Returns:
        Floating-point operations per second.
    """
    cuda = device.type == "cuda"
    sizes = [size] if size else [8192] if cuda else [512, 1024, 2048]
    best = 0.0
    for side in sizes:
        left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        fastest = float("inf")
        for _ in range(repeats + 3):  # the first ones load the library and raise the clock
            if cuda:
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            torch.nn.functional.linear(left, right)  # the layout of a layer's product
            if cuda:
                torch.cuda.synchronize(device)
            fastest = min(fastest, time.perf_counter() - start)
        best = max(best, 2 * side**3 / fastest)
        if 8 * fastest > 0.25:  # seconds of the next size's product
            break
    return best
