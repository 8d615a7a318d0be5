"""The options of the methods: complete on the command line and in checkpoints, through all base classes."""

import pytest
import torch
from jsonargparse import ArgumentParser
from pytorch_lightning import Trainer
from torch.utils.data import DataLoader

from nepa_plugin import methods

NAMES = [name for name in methods.__all__ if name != "Method"]
SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL = {
    "IJEPA": {"target_scale": (0.1, 0.15), "min_keep": 4, "predictor_dim": 16, "predictor_depth": 1},
    "DINO": {"output_dim": 24, "hidden_dim": 16, "bottleneck_dim": 8},
    "IBOT": {"output_dim": 24, "hidden_dim": 16, "bottleneck_dim": 8},
    "AIM": {"head_dim": 16, "head_blocks": 1},
    "BEiT": {"codebook_size": 16, "min_per_block": 4},
    "MAE": {"decoder_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2},
}
#: What the recipes differ in, per method: base_lr, min_lr, weight_decay, final_weight_decay, betas, warm-up, clipping.
#: Sources: each class's docstring.
RECIPES = {
    "NEPA": (3e-4, 0.0, 0.05, None, (0.9, 0.95), 0.025, 1.0, None),
    "SimCLR": (2e-4, 0.0, 0.1, None, (0.9, 0.999), 40 / 300, 0.0, 0.0),
    "MoCoV3": (1.5e-4, 0.0, 0.1, None, (0.9, 0.999), 40 / 300, 0.0, 0.0),
    "SimSiam": (1.5e-4, 0.0, 0.1, None, (0.9, 0.999), 40 / 300, 0.0, 0.0),
    "BYOL": (1e-4, 0.0, 0.03, None, (0.9, 0.999), 40 / 300, 0.0, 0.0),
    "DINO": (7.5e-4, 2e-6, 0.04, 0.4, (0.9, 0.999), 0.025, 0.3, 0.0),
    "IBOT": (7.5e-4, 2e-6, 0.04, 0.4, (0.9, 0.999), 0.025, 0.3, 0.0),
    "LeJEPA": (5e-4, 5e-7, 0.05, None, (0.9, 0.999), 0.01, 0.0, 0.0),
    "MAE": (1.5e-4, 0.0, 0.05, None, (0.9, 0.95), 0.025, 0.0, 0.0),
    "IJEPA": (1.25e-4, 1e-6, 0.04, 0.4, (0.9, 0.999), 0.025, 0.0, 0.0),
    "CPC": (3e-4, 0.0, 0.05, None, (0.9, 0.95), 0.025, 1.0, None),
    "IGPT": (6e-3, 0.0, 0.0, None, (0.9, 0.95), 0.01, 1.0, None),
    "BEiT": (1.875e-4, 1e-5, 0.05, None, (0.9, 0.999), 0.0125, 3.0, 0.0),
    "AIM": (6.25e-5, 0.0, 0.05, None, (0.9, 0.95), 0.0625, 1.0, 0.0),
}
NUMBERS = ("base_lr", "min_lr", "weight_decay", "final_weight_decay", "betas", "warmup_fraction")


def options(name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(getattr(methods, name), "m")
    return {a.dest.removeprefix("m."): a for a in parser._actions if a.dest.startswith("m.")}


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_has_every_option_with_its_meaning_and_the_recipes_value(name):
    found = options(name)
    base = options("Method")
    assert set(base) <= set(found)
    assert [key for key, action in found.items() if not action.help] == []
    numbers = (*NUMBERS, "clip_grad_norm", "ema_decay")
    assert tuple(found[key].default for key in numbers) == RECIPES[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_rebuilt_from_its_hyperparameters(name):
    cls = getattr(methods, name)
    backbone = "nepa_vit_tiny_patch14_224" if name in ("NEPA", "CPC", "IGPT") else "plain_vit_tiny_patch14_224"
    given = {"backbone": backbone, "img_size": 32, "patch_size": 4, "backbone_args": SIZE, "num_classes": 3}
    given |= {"drop_path_rate": 0.25, "base_lr": 1.5, **SMALL.get(name, {})}
    torch.manual_seed(0)
    first = cls(32, **given)
    assert set(first.hparams) == set(options(name))
    assert first.hparams.batch_size_per_device == 32 and given.items() <= dict(first.hparams).items()
    torch.manual_seed(0)
    again = cls(**first.hparams)
    assert again.base_lr == 1.5 and again.hparams == first.hparams
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in first.state_dict().items())


def test_a_checkpoint_is_loaded_as_lightning_users_do(tmp_path):
    method = methods.NEPA(
        4, 3, backbone="nepa_vit_tiny_patch14_224", img_size=32, patch_size=4, backbone_args=SIZE, ema_decay=0.5
    )
    batch = ([torch.randn(4, 3, 32, 32)], torch.tensor([0, 1, 2, 0]), ["a", "b", "c", "d"])
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(method, DataLoader([batch, batch], batch_size=None))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = methods.NEPA.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert loaded.hparams == method.hparams
    assert all(torch.equal(value, saved[name]) for name, value in loaded.state_dict().items())
