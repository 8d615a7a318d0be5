"""Features of a frozen backbone: tokens and pooled features at every depth, in one pass over the images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

POOLS = ("class", "last", "mean")


@dataclass
class DepthFeatures:
    """Features by depth and pooling, and the labels.

    Attributes:
        features: depth -> pooling -> (N, D), float32 on the CPU. Depths are ``embedding``, ``block 1`` ... ``block L``
            and ``final norm``; poolings are ``class`` (the class token, where it can differ between images), ``last``
            (the last token) and ``mean`` (of the patch tokens).
        labels: Class indices (N,).
        tokens: depth -> all tokens (N, T, D) of the depths that were asked for.
    """

    features: dict[str, dict[str, Tensor]]
    labels: Tensor
    tokens: dict[str, Tensor] = field(default_factory=dict)


def check_model(model: nn.Module) -> None:
    """Check that a model is a ViT whose tokens can be read.

    Raises:
        ValueError: If it has no ``blocks``, ``norm``, ``patch_embed`` or ``num_prefix_tokens``.
    """
    absent = [name for name in ("patch_embed", "blocks", "norm", "num_prefix_tokens") if not hasattr(model, name)]
    if absent:
        raise ValueError(
            f"{type(model).__name__} has no {', '.join(absent)}: evaluation reads Vision Transformers of timm, whose "
            "tokens pass through a list of blocks."
        )


def depth_names(model: nn.Module) -> list[str]:
    """Return the names of a transformer's depths, from the input embedding to the final norm."""
    return ["embedding", *(f"block {i + 1}" for i in range(len(model.blocks))), "final norm"]  # type: ignore[arg-type]


def check_depth(model: nn.Module, depth: str) -> None:
    """Raise ``ValueError`` if a model has no such depth."""
    if depth not in depth_names(model):
        raise ValueError(f"depth {depth!r} is not one of this model's: {', '.join(depth_names(model))}.")


def pool_names(model: nn.Module) -> tuple[str, ...]:
    """Return the poolings that a model has.

    The class token is left out where there is none, and under causal attention, where it comes first and sees only
    itself: it is then the same for every image.
    """
    has_class = getattr(model, "cls_token", None) is not None and not getattr(model, "is_causal", False)
    return POOLS if has_class else POOLS[1:]


def pool_tokens(model: Any, tokens: Tensor, pool: str) -> Tensor:
    """Return one float32 feature per image (B, D) of a model's tokens (B, T, D)."""
    if pool == "class":
        return tokens[:, 0].float()
    if pool == "last":
        last: Tensor = model.last_token(tokens) if hasattr(model, "last_token") else tokens[:, -1]
        return last.float()
    return tokens[:, model.num_prefix_tokens :].float().mean(dim=1)


def pool_states(
    model: Any, states: dict[str, Tensor], pairs: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], Tensor]:
    """Return the pooled features (B, D) of (depth, pooling) pairs of the tokens that :func:`token_states` caught."""
    return {(depth, pool): pool_tokens(model, states[depth], pool) for depth, pool in pairs}


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients inside the block, and back as it was after it."""
    modes = [(module, module.training) for module in model.modules()]
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, requires_grad in grads:
            parameter.requires_grad_(requires_grad)


@contextmanager
def token_states(model: Any, depths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Fill a dictionary with the tokens (B, T, D) at some depths whenever ``model.forward_features`` runs."""
    states: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any = None) -> None:
            tokens = args[0] if output is None else output
            if not isinstance(tokens, Tensor) or tokens.ndim != 3:
                raise ValueError(f"{type(model).__name__} has no token sequence (B, T, D) at {name!r}.")
            states[name] = tokens

        return hook

    hooks = []
    for name in depths:
        if name == "embedding":
            hooks.append(model.blocks[0].register_forward_pre_hook(keep(name)))
        elif name == "final norm":
            hooks.append(model.norm.register_forward_hook(keep(name)))
        else:
            hooks.append(model.blocks[int(name.split()[1]) - 1].register_forward_hook(keep(name)))
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


#: What is computed with: ``auto`` is bf16 autocast on CUDA, and float32 elsewhere.
Precision = Literal["auto", "32-true", "bf16-mixed"]


def resolve_precision(precision: Precision, device_type: str) -> Precision:
    """Return what is computed with on a device, as Lightning names it."""
    return precision if precision != "auto" else "bf16-mixed" if device_type == "cuda" else "32-true"


def autocast(device: torch.device, precision: Precision = "auto") -> torch.autocast:
    """Return bf16 autocast, or what leaves float32 as it is."""
    chosen = resolve_precision(precision, device.type)
    return torch.autocast(device.type, torch.bfloat16, enabled=chosen == "bf16-mixed")


class FrozenFeatures(nn.Module):
    """A frozen backbone as a module from images (B, C, H, W) to features (B, D), or to tokens (B, T, D).

    Args:
        model: The backbone; its weights are shared, and never changed.
        depth: Where to read.
        pool: ``"class"``, ``"last"``, ``"mean"``, or ``None`` for all tokens.
    """

    def __init__(self, model: nn.Module, depth: str = "final norm", pool: str | None = "mean") -> None:
        super().__init__()
        self.backbone: Any = model
        self.depth = depth
        self.pool = pool

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the features."""
        with token_states(self.backbone, [self.depth]) as states:
            self.backbone.forward_features(images)
        if self.pool is None:
            return states[self.depth].float()
        return pool_tokens(self.backbone, states[self.depth], self.pool)


@torch.no_grad()
def extract_depth_features(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Any]],
    device: str | torch.device = "cpu",
    wanted: Sequence[tuple[str, str]] | None = None,
    count: int | None = None,
    precision: Precision = "auto",
) -> DepthFeatures:
    """Run images through a frozen transformer and pool the tokens at every depth.

    Args:
        model: A timm ViT with ``blocks``, ``norm`` and ``num_prefix_tokens``. Its weights are not changed.
        batches: Yields (images (B, C, H, W), labels (B,), filenames).
        device: Where to run.
        wanted: (depth, pooling) pairs, ``"tokens"`` as the pooling for all tokens; every depth and pooling by default.
        count: Number of images. Where it is given, their features take their place in memory once; otherwise one
            tensor needs twice its size while it is put together.
        precision: What is computed with.

    Returns:
        The features of all images, in the order in which they came.

    Raises:
        ValueError: If there are no images, or the model is no ViT.
    """
    check_model(model)
    device = torch.device(device)
    if wanted is None:
        wanted = [(depth, pool) for depth in depth_names(model) for pool in pool_names(model)]
    kept = {pair: _Rows(count) for pair in wanted}
    labels = []
    with frozen(model), token_states(model, list(dict.fromkeys(depth for depth, _ in wanted))) as states:
        model.to(device)
        for images, targets, *_ in batches:
            with autocast(device, precision):
                model.forward_features(images.to(device, non_blocking=True))  # type: ignore[operator]
            pooled = pool_states(model, states, [pair for pair in wanted if pair[1] != "tokens"])
            if pooled:  # one copy to the CPU for all of them
                for pair, rows in zip(pooled, torch.stack(list(pooled.values())).cpu().unbind(), strict=True):
                    kept[pair].add(rows)
            for depth, pool in wanted:
                if pool == "tokens":
                    kept[depth, pool].add(states[depth].float().cpu())
            labels.append(targets)
    if not labels:
        raise ValueError("There are no images to extract features from.")
    return from_pairs({pair: rows.join() for pair, rows in kept.items()}, torch.cat(labels))


class _Rows:
    """Rows of one tensor that come in parts; of a known number, they are written where they will stay."""

    def __init__(self, count: int | None) -> None:
        self.count = count
        self.parts: list[Tensor] = []
        self.filled = 0

    def add(self, rows: Tensor) -> None:
        if self.count is None:
            self.parts.append(rows.clone())  # a view would keep what it is a part of
            return
        if not self.parts:
            self.parts.append(torch.empty(self.count, *rows.shape[1:], dtype=rows.dtype))
        self.parts[0][self.filled : self.filled + len(rows)] = rows
        self.filled += len(rows)

    def join(self) -> Tensor:
        if self.count is not None and self.filled != self.count:
            raise ValueError(f"{self.filled} images came, not the {self.count} that were said.")
        whole = torch.cat(self.parts) if self.count is None else self.parts[0]
        self.parts = []
        return whole


def from_pairs(pairs: dict[tuple[str, str], Tensor], labels: Tensor) -> DepthFeatures:
    """Return features by depth and pooling from tensors under (depth, pooling)."""
    features: dict[str, dict[str, Tensor]] = {}
    tokens = {}
    for (depth, pool), value in pairs.items():
        if pool == "tokens":
            tokens[depth] = value
        else:
            features.setdefault(depth, {})[pool] = value
    return DepthFeatures(features, labels, tokens)


def concat_depths(features: DepthFeatures, k: int = 4) -> DepthFeatures:
    """Add the pooling ``concat``: the mean-pooled features of the last k depths up to each one, side by side.

    Each part has unit length, so that no depth drowns the others. The first depths have fewer parts. Sources: DINO
    (Caron et al. 2021, appendix on linear evaluation), iGPT (Chen et al. 2020).

    Args:
        features: Features with the pooling ``mean``.
        k: Number of depths.

    Returns:
        The features with one more pooling, (N, up to k * D).
    """
    joined = {depth: pools | {"concat": concat_depth(features, depth, k)} for depth, pools in features.features.items()}
    return DepthFeatures(joined, features.labels, features.tokens)


def concat_depth(features: DepthFeatures, depth: str, k: int = 4) -> Tensor:
    """Return what :func:`concat_depths` adds at one depth, (N, up to k * D)."""
    depths = list(features.features)
    at = depths.index(depth) + 1
    return torch.cat([normalize(features.features[name]["mean"], dim=1) for name in depths[max(0, at - k) : at]], dim=1)


def gather_rows(
    rows: Tensor, total: int, device: str | torch.device = "cpu", everywhere: bool = False, chunk: int = 4096
) -> Tensor | None:
    """Collect rows that the processes hold in turn, row i in process ``i % world_size``, in their order.

    Args:
        rows: This process's rows (n, ...), n differing by at most one between processes.
        total: Number of all rows.
        device: Where the process group communicates.
        everywhere: Whether every process is to have them, and not process zero alone.
        chunk: Rows of a process that travel at a time, which is what the device must have room for.

    Returns:
        All rows (total, ...) on the CPU, each once; ``None`` in the processes that do not have them.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    world_size = dist.get_world_size()
    receives = everywhere or dist.get_rank() == 0
    whole = torch.empty(total, *rows.shape[1:], dtype=rows.dtype) if receives else None
    for start in range(0, -(-total // world_size), chunk):
        mine = rows[start : start + chunk]
        count = min(chunk, -(-total // world_size) - start)
        padded = torch.zeros(count, *rows.shape[1:], dtype=rows.dtype, device=device)
        padded[: len(mine)] = mine.to(device)
        parts = [torch.empty_like(padded) for _ in range(world_size)] if receives else []
        if everywhere:
            dist.all_gather(parts, padded)
        else:
            dist.gather(padded, parts or None)
        if whole is not None:
            place = whole[start * world_size : (start + count) * world_size]
            place.copy_(torch.stack(parts, dim=1).flatten(0, 1)[: len(place)])
    return whole


def gather_features(
    features: DepthFeatures, total: int, device: str | torch.device = "cpu", everywhere: bool = False
) -> DepthFeatures | None:
    """Collect the features of images ``rank::world_size`` of every process; see :func:`gather_rows`."""
    labels = gather_rows(features.labels, total, device, everywhere)
    pairs = {
        (depth, pool): gather_rows(value, total, device, everywhere)
        for depth, by_pool in features.features.items()
        for pool, value in by_pool.items()
    }
    pairs |= {(d, "tokens"): gather_rows(value, total, device, everywhere) for d, value in features.tokens.items()}
    return None if labels is None else from_pairs({k: v for k, v in pairs.items() if v is not None}, labels)
