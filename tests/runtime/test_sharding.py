"""Sharding of weights where it needs no second process; the rest is in ``test_scaling.py``."""

import pytest
import torch
import torch.distributed as dist
from pretraining import curve, run
from pytorch_lightning.plugins.layer_sync import TorchSyncBatchNorm
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from nepa_plugin.methods import SimCLR
from nepa_plugin.runtime.sharding import ShardedStrategy, full_tensors, shards_like


def test_whole_tensors_stay_as_they_are():
    state = {"a": torch.arange(3), "nested": [torch.ones(2), 4]}
    gathered = full_tensors(state)
    assert gathered["a"] is state["a"] and gathered["nested"][0] is state["nested"][0] and gathered["nested"][1] == 4
    own = {"a": torch.zeros(3)}
    assert shards_like(state | {"new": torch.ones(1)}, own)["a"] is state["a"]


@pytest.fixture
def mesh(tmp_path):
    """The device mesh of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))
    dist.destroy_process_group()


def test_batch_norm_is_synchronised_before_sharding(mesh):
    """Its statistics over several processes cannot be tested here: PyTorch refuses tensors of the CPU for that."""
    size = {"embed_dim": 32, "depth": 1, "num_heads": 2, "attention": "bidirectional"}
    method = SimCLR(4, 3, backbone="nepa_vit_tiny_patch14_224", img_size=16, patch_size=4, backbone_args=size)
    strategy = ShardedStrategy()
    strategy._device_mesh = mesh
    strategy._layer_sync = TorchSyncBatchNorm()
    strategy.shard(method)
    kinds = [type(part) for part in method.modules() if "BatchNorm" in type(part).__name__]
    assert kinds and set(kinds) == {nn.SyncBatchNorm}
    assert all(isinstance(parameter, DTensor) for parameter in method.parameters())


@pytest.mark.slow
def test_one_device_may_be_sharded_too(tmp_path):
    short = "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 4
    run("--run_dir", tmp_path / "whole", *short)
    run("--run_dir", tmp_path / "sharded", *short, "--trainer.strategy", "fsdp")
    whole, sharded = curve(tmp_path / "whole"), curve(tmp_path / "sharded")
    assert list(whole) == list(sharded) == [0, 1, 2, 3]
    assert max(abs(whole[step] - sharded[step]) for step in whole) < 1e-6
