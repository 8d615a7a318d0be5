"""Sharding of weights where it needs no second process; the rest is in ``test_scaling.py``."""

import pytest
import torch
from pretraining import curve, run
from pytorch_lightning.plugins.layer_sync import TorchSyncBatchNorm
from torch import nn

from nepa_plugin.runtime import sharding
from nepa_plugin.runtime.sharding import ShardedStrategy, check_shardable, full_tensors, shards_like


def test_whole_tensors_stay_as_they_are():
    state = {"a": torch.arange(3), "nested": [torch.ones(2), 4]}
    gathered = full_tensors(state)
    assert gathered["a"] is state["a"] and gathered["nested"][0] is state["nested"][0] and gathered["nested"][1] == 4
    own = {"a": torch.zeros(3)}
    assert shards_like(state | {"new": torch.ones(1)}, own)["a"] is state["a"]


def test_a_method_that_cannot_be_sharded_is_refused():
    module = nn.Linear(2, 2)
    check_shardable(module)
    module.shardable = False
    with pytest.raises(ValueError, match="Linear cannot be trained with"):
        check_shardable(module)


def test_batch_norm_is_synchronised_before_sharding(monkeypatch):
    sharded = []
    monkeypatch.setattr(sharding, "shard", lambda module, mesh, precision: sharded.append(module[1]))
    strategy = ShardedStrategy()
    strategy._device_mesh = {"data_parallel": None}
    strategy._layer_sync = TorchSyncBatchNorm()
    strategy.shard(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    assert isinstance(sharded[0], nn.SyncBatchNorm)


@pytest.mark.slow
def test_one_device_may_be_sharded_too(tmp_path):
    short = "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 4
    run("--run_dir", tmp_path / "whole", *short)
    run("--run_dir", tmp_path / "sharded", *short, "--trainer.strategy", "fsdp")
    whole, sharded = curve(tmp_path / "whole"), curve(tmp_path / "sharded")
    assert list(whole) == list(sharded) == [0, 1, 2, 3]
    assert max(abs(whole[step] - sharded[step]) for step in whole) < 1e-6
