"""NEPA's run on a folder of sequences: trained, resumed exactly, exported without its predictor head."""

import numpy as np
import pytest
import torch
from every_method import curve, state
from sklearn.datasets import load_digits

import nepa_plugin
from nepa_plugin.methods import NEPA
from nepa_plugin.training.cli import base_config, main


@pytest.mark.slow
def test_the_command_trains_exports_and_resumes(tmp_path):
    rows, digits = tmp_path / "rows", load_digits()
    rows.mkdir()
    for i, length in enumerate(np.random.default_rng(0).integers(3, 9, 60)):
        np.save(rows / f"{i:03d}.npy", (digits.images[i][:length] / 8 - 1).astype(np.float32))

    size = '{"input_dim": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}'
    options = [
        *("--config", "nepa_sequences", "--data.train_dir", str(rows), "--data.max_tokens", "6"),
        *("--model.backbone", "nepa_sequence_tiny", "--model.backbone_args", size, "--model.predictor_head", "mlp"),
        *("--global_batch_size", "12", "--data.batch_size_per_device", "12", "--trainer.log_every_n_steps", "1"),
        *("--trainer.max_epochs", "2", "--checkpoint_every_n_steps", "2"),
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main([*options, "--run_dir", str(whole)], base_config())
    with pytest.MonkeyPatch.context() as patch:
        start = NEPA.on_train_batch_start

        def stop(self, batch, index):
            if self.trainer.global_step == 7:
                raise KeyError("stop")
            return start(self, batch, index)

        patch.setattr(NEPA, "on_train_batch_start", stop)
        with pytest.raises(KeyError):
            main([*options, "--run_dir", str(parts)], base_config())
    main([*options, "--run_dir", str(parts), "--ckpt_path", "last"], base_config())
    assert curve(whole) == curve(parts) and len(curve(whole)) == 10
    assert all(torch.equal(value, state(parts)[key]) for key, value in state(whole).items())
    backbone = nepa_plugin.load_backbone(whole / "backbone")
    assert backbone.input_dim == 8 and not any("heads" in key for key in backbone.state_dict())
