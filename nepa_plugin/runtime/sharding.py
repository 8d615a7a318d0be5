"""Weights, gradients, optimizer state and averages sharded over the devices: torch's FSDP2 in Lightning."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

# -- shards and whole tensors ------------------------------------------------------------------------------------------


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, which shares its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor, gathered from all ranks; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_tensors(state: Any) -> Any:
    """Return a state (nested dicts and lists) with whole tensors instead of shards, on the CPU of rank zero only.

    Gathers one tensor at a time; every rank must call it. A state without shards is returned as it is.
    """

    def gather(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        whole = value.full_tensor().detach()
        return whole.cpu() if torch.distributed.get_rank() == 0 else None

    return tree_map(gather, state)


def shard_like(value: Tensor, own: Any) -> Tensor:
    """Return this rank's shard of a whole tensor if ``own``, its counterpart here, is sharded; else ``value``."""
    if not isinstance(own, DTensor):
        return value
    value = value.to(own.device, own.dtype)
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)  # sends nothing


def shards_like(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state of whole tensors with those sharded that are sharded in ``own``, the state of a module here."""
    return {name: shard_like(value, own.get(name)) for name, value in state.items()}


# -- sharding ----------------------------------------------------------------------------------------------------------


def shard(module: Any, mesh: DeviceMesh, precision: str) -> None:
    """Shard a method's parameters, each along its first axis over all ranks, in place.

    The attention and the MLP of each block, those of a momentum encoder too, are gathered for the time of their own
    forward and backward pass, everything else for the time of the step. Under bf16 these matrices are gathered in
    bfloat16, and gradients are still summed in float32: that is what autocast computes with whole weights, too.
    LayerScale, norms and the residual stream stay in float32, where LayerScale's first values of 1e-5 would be lost in
    bfloat16.

    Args:
        module: The method, with a ``backbone`` whose ``blocks`` are timm's, and perhaps a ``teacher_backbone`` like it.
        mesh: The ranks.
        precision: Lightning's name of the precision.
    """
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    # timm's blocks add to them out of place, which is what this asks for
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    backbones = [module.backbone, *([module.teacher_backbone] if hasattr(module, "teacher_backbone") else [])]
    for block in (block for backbone in backbones for block in backbone.blocks):
        for part in (block.attn, block.mlp):
            fully_shard(part, mesh=mesh, mp_policy=half if precision == "bf16-mixed" else whole)
    # After validation, too, the parameters must be shards again: the moving average is swapped with them.
    fully_shard(module, mesh=mesh, mp_policy=whole, reshard_after_forward=True)
    for method in ("training_step", "validation_step"):
        register_fsdp_forward_method(module, method)


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2 with the checkpoints of any other run.

    Lightning's own either writes a folder of shards or numbers the optimizer's state differently from a run on one
    device, and it loads weights past the callbacks. Here a checkpoint is one file of whole tensors, as without
    sharding, and every rank takes its shards from it: a run goes on with any number of processes, and any strategy.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Start the processes' group, with one mesh over all of them."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, module: Any) -> None:
        """Shard a method's parameters in place; its ``configure_model`` asks for it."""
        if self._layer_sync is not None:  # Lightning does this for DDP only
            self._layer_sync.apply(module)
        shard(module, self.device_mesh["data_parallel"], str(self.precision_plugin.precision))

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning restores the optimizer's state through :meth:`load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the whole weights, on the CPU of rank zero."""
        assert self.lightning_module is not None
        state: dict[str, Any] = full_tensors(self.lightning_module.state_dict())
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's whole state, on the CPU of rank zero."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        state: dict[str, Any] = full_tensors(optimizer.state_dict())
        return state

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = True) -> dict[str, Any]:
        """Open a checkpoint; the ranks of a machine share its pages instead of reading a copy each."""
        checkpoint: dict[str, Any] = torch.load(
            self.broadcast(checkpoint_path), map_location="cpu", mmap=True, weights_only=True
        )
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights, each rank its shards."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        self.lightning_module.load_state_dict(shards_like(checkpoint["state_dict"], own), strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizers' states, each rank its shards."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            sharded = {
                i: {k: shard_like(v, parameters[i]) if v.shape == parameters[i].shape else v for k, v in values.items()}
                for i, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": sharded})
