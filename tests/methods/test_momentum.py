"""Momentum encoders inside Lightning's loop: what they are there must hold where no hook of ours is called."""

import contextlib

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from torch.utils.data import DataLoader

from nepa_plugin.methods import BYOL, DINO, IBOT, IJEPA, MoCoV3

SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 2}
BLOCKS = {"target_scale": (0.1, 0.15), "min_keep": 4, "predictor_dim": 16, "predictor_depth": 1}
PROTOTYPES = {"output_dim": 24, "hidden_dim": 16, "bottleneck_dim": 8, "num_local_crops": 1}
HEADS = {"hidden_dim": 16, "projection_dim": 8}
OPTIONS = {BYOL: HEADS, MoCoV3: HEADS, DINO: PROTOTYPES, IBOT: PROTOTYPES, IJEPA: BLOCKS}
#: Of these, a NEPA predictor can be the backbone, whose RoPE is rescaled at random in training mode.
ON_PREDICTOR = [BYOL, MoCoV3, DINO]
PREDICTOR = {"backbone": "nepa_vit_tiny_patch14_224", "backbone_args": SIZE | {"attention": "bidirectional"}}


def method(cls, **kwargs):
    torch.manual_seed(0)
    args = {"backbone": "plain_vit_tiny_patch14_224", "img_size": 32, "patch_size": 4, "backbone_args": SIZE}
    return cls(batch_size_per_device=4, num_classes=3, **(args | {"drop_path_rate": 0.5} | OPTIONS[cls] | kwargs))


def loader(batches):
    return DataLoader(batches, batch_size=None)


class Modes(Callback):
    """Looks at the modes in every step, and at what the teacher says twice about the same images."""

    def __init__(self):
        self.steps, self.equal, self.student_differs = 0, [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps += 1
        assert pl_module.training and pl_module.backbone.training
        assert not any(module.training for module in pl_module.teacher_backbone.modules())
        heads = [teacher for _, teacher in pl_module.momentum_pairs()][1:]
        assert all(module.training for head in heads for module in head.modules())
        with torch.no_grad():
            said = [pl_module.teacher_backbone.forward_features(batch[0][0]) for _ in range(2)]
            learned = [pl_module.backbone.forward_features(batch[0][0]) for _ in range(2)]
        self.equal.append(torch.equal(*said))
        self.student_differs.append(not torch.equal(*learned))


@pytest.mark.parametrize(("cls", "exported"), [(DINO, True), (IJEPA, True), (BYOL, False)])
def test_what_is_left_of_the_first_weights_of_the_exported_encoder(cls, exported, tmp_path):
    """Weights of one that follow weights of zero; of four steps from 0.5 to 1, 0.5 x 0.625 x 0.875 x 1 are left."""
    model = method(cls, momentum=0.5, drop_path_rate=0.0, base_lr=0.0)
    torch.nn.init.zeros_(model.backbone.blocks[0].mlp.fc1.weight)
    left = torch.nn.init.ones_(model.teacher_backbone.blocks[0].mlp.fc1.weight)
    size = (32, 32, 16) if cls is DINO else (32, 32) if cls is BYOL else (32,)
    batch = ([torch.randn(4, 3, side, side) for side in size], torch.tensor([0, 1, 2, 0]), ["a", "b", "c", "d"])
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_epochs=2, accelerator="cpu", devices=1, default_root_dir=tmp_path, **quiet)
    with pytest.warns(UserWarning, match="27% of the momentum encoder") if exported else contextlib.nullcontext():
        trainer.fit(model, loader([batch, batch]))
    torch.testing.assert_close(left, torch.full_like(left, 0.2734375))
    assert model.first_weights(4) == pytest.approx(0.2734375 * exported)


@pytest.mark.parametrize(
    ("cls", "more"), [*((cls, {}) for cls in OPTIONS), *((cls, PREDICTOR) for cls in ON_PREDICTOR)]
)
def test_the_momentum_encoder_is_in_evaluation_mode_through_fit(cls, more, tmp_path):
    model, modes = method(cls, **more), Modes()
    generator = torch.Generator().manual_seed(1)
    sizes = (32, 32, 16) if cls in (DINO, IBOT) else (32, 32) if cls in (BYOL, MoCoV3) else (32,)
    views = [torch.randn(4, 3, size, size, generator=generator) for size in sizes]
    batch = (views, torch.tensor([0, 1, 2, 0]), ["a", "b", "c", "d"])
    trainer = Trainer(
        max_epochs=2,  # with a validation between, after which Lightning restores modes
        accelerator="cpu",
        devices=1,
        callbacks=[modes],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, loader([batch, batch]), loader([(views[0], *batch[1:])]))
    assert modes.steps == 4 and all(modes.equal) and all(modes.student_differs)
