"""Whether a config can be that of the weights beside it, before anything of its size is built."""

import re
from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor

from nepa_plugin.checkpoints.errors import CheckpointError

#: Arguments of ``timm.create_model`` that open other files or places.
ELSEWHERE = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "hf_token")
#: Arguments that say how much there is of something: positive whole numbers.
COUNTS = ("depth", "embed_dim", "num_heads", "in_chans", "num_classes", "patch_size", "img_size")
LARGEST_IMAGE, MOST_PATCHES = 2**15, 2**10  # a side


def check_plausible(arch: Any, args: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> None:
    """Check that a model can have these weights, from their number and shapes.

    Args:
        arch: Name of the architecture.
        args: Arguments of ``timm.create_model``.
        state: The weights.
        source: What to call the checkpoint in an error.

    Raises:
        CheckpointError: If the architecture is no name that timm knows, an argument opens another place, or is no
            number that fits the weights.
    """
    if not isinstance(arch, str) or not timm.is_model(arch):
        raise CheckpointError(f"{source}: {arch!r} is no architecture that timm {timm.__version__} knows.")
    if elsewhere := [name for name in ELSEWHERE if args.get(name)]:
        raise CheckpointError(f"{source}: its config has {elsewhere[0]}, which opens another place; remove it there.")
    for name in COUNTS:
        least = 0 if name == "num_classes" else 1
        for value in _numbers(args.get(name, least), name, source):
            if value < least:
                raise CheckpointError(f"{source}: {name} = {value} in its config; at least {least} is needed.")
    if not state:
        return
    largest = max(max(value.shape, default=1) for value in state.values())
    limits = {"embed_dim": largest, "num_heads": largest, "num_classes": largest, "in_chans": largest}
    limits |= {"depth": blocks(state) or len(state), "img_size": LARGEST_IMAGE, "patch_size": LARGEST_IMAGE}
    for name, limit in limits.items():
        for value in _numbers(args.get(name, 1), name, source):
            if value > limit:
                raise CheckpointError(
                    f"{source}: {name} = {value} in its config, but its weights allow {limit} at most."
                )
    sides = [min(_numbers(args.get(name, 1), name, source)) for name in ("img_size", "patch_size")]
    if sides[0] // sides[1] > MOST_PATCHES:
        raise CheckpointError(f"{source}: images of {sides[0]} pixels in patches of {sides[1]} are too many patches.")
    ratio = args.get("mlp_ratio", 1)
    if not isinstance(ratio, (int, float)) or not 0 < ratio <= largest:
        raise CheckpointError(f"{source}: mlp_ratio = {ratio!r} in its config; a positive number is needed.")
    width, heads = args.get("embed_dim"), args.get("num_heads")
    if isinstance(width, int) and isinstance(heads, int) and width % heads:
        raise CheckpointError(f"{source}: embed_dim = {width} in its config is not a multiple of num_heads = {heads}.")


def blocks(state: Mapping[str, Tensor]) -> int:
    """Return how many transformer blocks these weights are of; 0 where they are of another kind of network."""
    numbers = {found.group(1) for key in state if (found := re.match(r"blocks\.(\d+)\.", key))}
    return len(numbers)


def _numbers(value: Any, name: str, source: str) -> list[int]:
    """Return a number, or a pair of them, as a list."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in values):
        raise CheckpointError(f"{source}: {name} = {value!r} in its config is no whole number.")
    return values
