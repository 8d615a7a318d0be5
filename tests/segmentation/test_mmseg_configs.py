"""The shipped configs build what they say."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("mmseg")
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

CONFIGS = Path(__file__).parents[2] / "mmseg_configs"
LEAVES = sorted(path.name for path in CONFIGS.glob("*.py"))


def config_of(name):
    cfg = Config.fromfile(CONFIGS / name)
    init_default_scope("mmseg")
    return cfg


def build(cfg):
    cfg.model.backbone.init_cfg = None
    return revert_sync_batchnorm(MODELS.build(cfg.model))


@pytest.mark.parametrize("name", LEAVES)
def test_every_config_is_complete_and_survives_being_saved(name):
    """A resumed run parses the config text that the checkpoint holds."""
    cfg = config_of(name)
    again = Config.fromstring(cfg.pretty_text, ".py")
    assert again.to_dict() == cfg.to_dict()
    for key in ("model", "train_dataloader", "optim_wrapper", "param_scheduler", "train_cfg", "custom_hooks"):
        assert key in cfg, key
    segmentor = cfg.model.get("module", cfg.model)
    assert cfg.default_hooks.checkpoint.save_best == "mIoU"
    assert segmentor.backbone.type == "TimmViT"
    # the schedule ends with the training
    assert "end" not in cfg.param_scheduler[-1]  # as long as the run
    assert cfg.param_scheduler[0].end < cfg.train_cfg.max_iters
    assert cfg.param_scheduler[0].end == cfg.param_scheduler[1].begin


def test_the_recipe():
    """RECIPES: 160k iterations, batch 16, 512x512, AdamW 1e-4, (0.9, 0.999), 0.05; the rest by size."""
    for name, decay, drop_path, blocks in (
        ("nepa_vit_b_ade20k.py", 0.65, 0.1, (3, 5, 7, 11)),
        ("nepa_vit_l_ade20k.py", 0.75, 0.2, (7, 11, 15, 23)),
    ):
        cfg = config_of(name)
        optimizer = cfg.optim_wrapper.optimizer
        assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", 1e-4, 0.05)
        assert tuple(optimizer.betas) == (0.9, 0.999)
        assert cfg.optim_wrapper.paramwise_cfg.layer_decay == decay
        assert (cfg.train_cfg.max_iters, cfg.train_dataloader.batch_size) == (160000, 16)
        assert (cfg.param_scheduler[0].end, cfg.param_scheduler[1].power) == (1500, 1.0)
        assert tuple(cfg.model.backbone.out_indices) == blocks and cfg.model.backbone.drop_path_rate == drop_path
        assert cfg.model.backbone.attention == "bidirectional"
        assert tuple(cfg.model.data_preprocessor.size) == (512, 512)
        causal = config_of(name.replace(".py", "_causal.py"))
        assert causal.model.backbone.pop("attention") == "causal"
        cfg.model.backbone.pop("attention")
        assert causal.model == cfg.model


@pytest.mark.parametrize(("variable", "processes"), [("WORLD_SIZE", 8), ("SLURM_NTASKS", 4)])
def test_processes_share_the_batch(variable, processes, monkeypatch):
    monkeypatch.setenv(variable, str(processes))
    assert config_of("nepa_vit_b_ade20k.py").train_dataloader.batch_size * processes == 16


def test_multi_scale_and_flip():
    cfg = config_of("nepa_vit_b_ade20k_ms.py")
    assert cfg.model.type == "SegTTAModel" and cfg.model.module == config_of("nepa_vit_b_ade20k.py").model
    augmentation = cfg.test_dataloader.dataset.pipeline[-1]
    sizes = [t.scale for t in augmentation.transforms[0]]
    assert sizes == [(1024, 256), (1536, 384), (2048, 512), (2560, 640), (3072, 768), (3584, 896)]
    assert [t.prob for t in augmentation.transforms[1]] == [0.0, 1.0]


def one_iteration(name, **backbone):
    """On 128x128 pixels, a sixteenth of the recipe's."""
    torch.manual_seed(0)
    cfg = config_of(name)
    cfg.model.backbone.update(backbone)
    cfg.model.data_preprocessor.size = (128, 128)
    model = build(cfg).train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    labels = torch.randint(0, 150, (2, 1, 128, 128))
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]
    data = {"inputs": list(torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)), "data_samples": samples}
    losses = model.train_step(data, wrapper)
    assert {"decode.loss_ce", "aux.loss_ce"} <= losses.keys() and torch.isfinite(losses["loss"])
    # AdamW has seen a gradient of every trained parameter; drop path may have made that of a late block zero
    moments = {n: wrapper.optimizer.state[p]["exp_avg"] for n, p in model.named_parameters() if p.requires_grad}
    assert all(moment.any() for n, moment in moments.items() if ".blocks." not in n or ".blocks.0." in n)
    return model, wrapper, cfg


def check_rates(model, wrapper, decay):
    """lr * decay ** (L - i) for block i, one more power for the embedding, none for the heads."""
    rates = {id(p): g["lr"] for g in wrapper.optimizer.param_groups for p in g["params"]}
    depth = len(model.backbone.vit.blocks)
    trained = {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(rates)
    for name, rate in trained.items():
        if name.startswith("backbone.vit.blocks."):
            power = depth - int(name.split(".")[3])
        else:
            power = depth + 1 if name.startswith("backbone.") else 0
        assert rate == pytest.approx(1e-4 * decay**power), name


@pytest.mark.slow
def test_vit_b_trains():
    model, wrapper, _ = one_iteration("nepa_vit_b_ade20k.py")
    check_rates(model, wrapper, 0.65)
    vit = model.backbone.vit
    assert (vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads) == (768, 12, 12)
    assert vit.patch_embed.patch_size == (14, 14) and not vit.is_causal
    with torch.no_grad():
        maps = model.eval().backbone(torch.zeros(1, 3, 512, 512))
        assert [m.shape for m in maps] == [(1, 768, 37, 37)] * 4
        assert [m.shape[-2:] for m in model.neck(maps)] == [(148, 148), (74, 74), (37, 37), (18, 18)]


@pytest.mark.slow
def test_vit_l_trains():
    """Wide as it is; four of its blocks are enough, and 2 GB of memory instead of 13."""
    model, wrapper, _ = one_iteration("nepa_vit_l_ade20k.py", model_args={"depth": 4}, out_indices=(0, 1, 2, 3))
    check_rates(model, wrapper, 0.75)
    assert model.backbone.vit.embed_dim == 1024


def test_vit_l_has_the_size_and_rates_of_its_recipe():
    cfg = config_of("nepa_vit_l_ade20k.py")
    with torch.device("meta"):
        model = build(cfg)
    check_rates(model, build_optim_wrapper(model, cfg.optim_wrapper), 0.75)
    vit = model.backbone.vit
    assert (vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads) == (1024, 24, 16)
    assert model.backbone.out_indices == (7, 11, 15, 23)
