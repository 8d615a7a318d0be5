"""Crops of different sizes resized in one batch, where the pixels are: two matrix products per group of crops."""

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode

from nepa_plugin.runtime.transfer import to_device

#: Padded pixels that are resampled at once; bounds the memory, at 12 bytes each, where one image of a batch is large.
GROUP_PIXELS = 2**25


def _kernel(x: Tensor, interpolation: InterpolationMode) -> Tensor:
    x = x.abs()
    if interpolation is InterpolationMode.BILINEAR:
        return (1 - x).clamp(min=0)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2  # Keys with a = -0.5, as PIL and torch
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def resampling_matrices(
    lengths: Tensor, padded: int, size: int, interpolation: InterpolationMode, mirrored: Tensor | None = None
) -> Tensor:
    """Return the matrices that resize rows of pixels with antialiasing.

    The filter is widened where pixels are lost, and its weights sum to 1 over the pixels there are. Source: the weights
    of Pillow's ``resize`` and of ``torch.nn.functional.interpolate(antialias=True)``.

    Args:
        lengths: Pixels of each row, (B,), on the device where the matrices are wanted.
        padded: Length that the rows are padded to; what is beyond a row's own length has no weight.
        size: Pixels of the result.
        interpolation: Bilinear or bicubic.
        mirrored: Which results to mirror, (B,) of bool.

    Returns:
        Matrices (B, size, padded).
    """
    pixels = torch.arange(padded, device=lengths.device) + 0.5
    results = torch.arange(size, device=lengths.device).expand(len(lengths), -1)
    if mirrored is not None:
        results = torch.where(mirrored[:, None], size - 1 - results, results)
    scale = (lengths / size)[:, None]
    centres = (results + 0.5) * scale
    weights = _kernel((pixels - centres[..., None]) / scale.clamp(min=1)[..., None], interpolation)
    weights = weights.masked_fill(pixels > lengths[:, None, None], 0)
    return weights / weights.sum(-1, keepdim=True)


def resize_crops(crops: list[Tensor], flips: Tensor, size: tuple[int, int], interpolation: InterpolationMode) -> Tensor:
    """Resize crops with antialiasing, and flip them, on the device that they are on.

    Args:
        crops: uint8 pixels (3, h, w), of any sizes.
        flips: Which of them to flip from left to right, (B,) of bool on the CPU.
        size: (H, W) of the result.
        interpolation: Bilinear or bicubic.

    Returns:
        Pixels (B, 3, H, W) in float32 from 0 to 255, not rounded.
    """
    device = crops[0].device
    order = sorted(range(len(crops)), key=lambda i: crops[i][0].numel())  # like sizes together: little padding
    table = torch.tensor([[i, *crops[i].shape[1:], bool(flips[i])] for i in order])
    table = to_device(table, device)
    resized = torch.empty(len(crops), 3, *size, device=device)
    start = 0
    for group in _groups([crops[i] for i in order]):
        where, heights, widths, mirrored = table[start : start + len(group)].unbind(1)
        start += len(group)
        height, width = (max(crop.shape[axis] for crop in group) for axis in (1, 2))
        padded = torch.zeros(len(group), 3, height, width, device=device)
        for canvas, crop in zip(padded, group, strict=True):
            canvas[:, : crop.shape[1], : crop.shape[2]] = crop
        columns = resampling_matrices(widths, width, size[1], interpolation, mirrored.bool())
        rows = resampling_matrices(heights, height, size[0], interpolation)
        resized[where] = rows[:, None] @ (padded @ columns[:, None].mT)
    return resized.clamp_(0, 255)  # bicubic weights overshoot


def _groups(crops: list[Tensor]) -> list[list[Tensor]]:
    """Split crops, in order of size, so that none of the padded groups is large."""
    groups: list[list[Tensor]] = [[]]
    for crop in crops:
        group = [*groups[-1], crop]
        padded = len(group) * max(c.shape[1] for c in group) * max(c.shape[2] for c in group)
        if padded > GROUP_PIXELS and groups[-1]:
            groups.append([crop])
        else:
            groups[-1].append(crop)
    return groups
