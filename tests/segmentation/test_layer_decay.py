import pytest

pytest.importorskip("mmseg")
from mmengine.optim import build_optim_wrapper
from torch import nn

from nepa_plugin.segmentation import TimmViT


class Segmentor(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        size = {"embed_dim": 32, "depth": 2, "num_heads": 2}
        self.backbone = TimmViT("nepa_vit_tiny_patch14_224", img_size=28, model_args=size, **kwargs)
        self.decode_head = nn.Conv2d(32, 4, 1)


def wrapper_of(model, paramwise_cfg):
    return build_optim_wrapper(
        model,
        {
            "type": "BFloat16OptimWrapper",
            "optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.05},
            "constructor": "LayerDecayConstructor",
            "paramwise_cfg": paramwise_cfg,
        },
    )


def test_each_parameter_has_its_layers_rate():
    model = Segmentor(final_norm=True)
    groups = wrapper_of(model, {"layer_decay": 0.5}).optimizer.param_groups
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == len(list(model.parameters())) == sum(len(g["params"]) for g in groups)
    vit = model.backbone.vit
    expected = {
        vit.cls_token: (0.125, 0.05),
        vit.patch_embed.proj.weight: (0.125, 0.05),
        vit.patch_embed.proj.bias: (0.125, 0.0),
        vit.blocks[0].attn.qkv.weight: (0.25, 0.05),
        vit.blocks[0].gamma_1: (0.25, 0.0),
        vit.blocks[1].mlp.fc1.weight: (0.5, 0.05),
        vit.blocks[1].norm1.weight: (0.5, 0.0),
        vit.norm.weight: (1.0, 0.0),
        model.decode_head.weight: (1.0, 0.05),
        model.decode_head.bias: (1.0, 0.0),
    }
    for parameter, values in expected.items():
        assert found[id(parameter)] == values


def test_frozen_parameters_are_left_out():
    groups = wrapper_of(Segmentor(frozen_stages=1), {"layer_decay": 0.5}).optimizer.param_groups
    assert [g["name"] for g in groups] == [
        "block 1",
        "block 1 (no weight decay)",
        "final norm, neck and heads",
        "final norm, neck and heads (no weight decay)",
    ]


@pytest.mark.parametrize("paramwise_cfg", [{}, {"layer_decay": 0}, {"layer_decay": 1.5}, {"decay_rate": 0.5}])
def test_bad_paramwise_cfg(paramwise_cfg):
    with pytest.raises(ValueError, match="layer_decay=d"):
        wrapper_of(Segmentor(), paramwise_cfg)


def test_a_model_without_the_backbone_is_refused():
    with pytest.raises(ValueError, match="no TimmViT backbone"):
        wrapper_of(nn.Linear(2, 2), {"layer_decay": 0.5})
