import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file

pytest.importorskip("mmseg")
from conftest import TOY, TOY_CLASSIFIER
from mmengine.registry import MODELS

import nepa_plugin
from nepa_plugin.checkpoints import BACKBONE_CONFIG_KEY, CheckpointError, backbone_config
from nepa_plugin.segmentation import TimmViT

ARCH, SIZE = "nepa_vit_tiny_patch14_224", {"embed_dim": 64, "depth": 3, "num_heads": 2}


def toy_backbone(checkpoint=TOY, **kwargs):
    init_cfg = None if checkpoint is None else {"type": "Pretrained", "checkpoint": str(checkpoint)}
    arguments = {"arch": ARCH, "img_size": 16, "patch_size": 4, "model_args": SIZE, "init_cfg": init_cfg} | kwargs
    model = MODELS.build({"type": "TimmViT", **arguments})
    model.init_weights()
    return model.eval()


def as_pth(folder, tmp_path):
    model = nepa_plugin.load_backbone(folder)
    weights = {f"backbone.vit.{k}": v for k, v in model.state_dict().items()} | {"decode_head.x": torch.zeros(1)}
    torch.save({"state_dict": weights, BACKBONE_CONFIG_KEY: backbone_config(model)}, tmp_path / "iter_1.pth")
    return tmp_path / "iter_1.pth"


def as_ckpt(folder, tmp_path):
    model = nepa_plugin.load_backbone(folder)
    weights = {f"backbone.{k}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": weights, BACKBONE_CONFIG_KEY: backbone_config(model)}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def as_timm(folder, tmp_path):
    return nepa_plugin.save_backbone(nepa_plugin.load_backbone(folder), tmp_path / "backbone")


@pytest.mark.parametrize("layout", [lambda folder, tmp_path: folder, as_timm, as_ckpt, as_pth])
def test_every_checkpoint_gives_the_same_weights(layout, tmp_path):
    own = toy_backbone(layout(TOY, tmp_path)).vit.state_dict()
    reference = nepa_plugin.load_backbone(TOY).state_dict()
    assert own.keys() == reference.keys()
    assert all(torch.equal(own[name], reference[name]) for name in own)


@pytest.mark.parametrize(
    ("attention", "key"),
    [("bidirectional", "last_hidden_state_bidirectional"), ("causal", "last_hidden_state")],
)
def test_output_equals_the_published_model(expected, attention, key):
    (maps,) = toy_backbone(final_norm=True, attention=attention)(expected["pixel_values"])
    patches = expected[key][:, 1:]
    torch.testing.assert_close(maps, patches.transpose(1, 2).reshape(3, 64, 4, 4), atol=1e-5, rtol=1e-5)


def test_inner_states_equal_the_published_model(expected):
    maps = toy_backbone(attention="causal", out_indices=(0, 1))(expected["pixel_values"])
    for i, found in enumerate(maps):
        tokens = expected[f"hidden_states.{i + 1}"][:, 1:]
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), tokens, atol=1e-5, rtol=1e-5)


def test_a_classifier_loads_without_its_head():
    with pytest.raises(CheckpointError, match="qk_norm_affine is True, the config has False"):
        toy_backbone(TOY_CLASSIFIER, model_args={**SIZE, "qk_norm_affine": False})
    own = toy_backbone(TOY_CLASSIFIER).vit.state_dict()  # QK-norm's weight is the checkpoint's
    reference = nepa_plugin.load_backbone(TOY_CLASSIFIER).state_dict()
    assert set(reference) - set(own) == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    assert all(torch.equal(own[name], reference[name]) for name in own)


@pytest.mark.parametrize(
    "details",
    [
        {"mlp_act": "silu"},
        {"swiglu_mlp": True, "mlp_act": "gelu", "mlp_ratio": 1.5},
        {"qk_norm": False, "init_values": 0},
        {"qk_norm_affine": True, "mlp_ratio": 2.0},
    ],
)
@pytest.mark.parametrize("layout", ["timm", "nepa"])
def test_details_are_the_checkpoints(details, layout, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(ARCH, img_size=16, patch_size=4, **SIZE, **details).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    nepa_plugin.save_backbone(model, tmp_path / "b", layout=layout)
    images = torch.randn(2, 3, 16, 16)
    (maps,) = toy_backbone(tmp_path / "b", final_norm=True, attention="causal")(images)
    tokens = model(images)[:, 1:]
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), tokens)


def test_patches_are_read_in_the_checkpoints_order(tmp_path):
    folder = nepa_plugin.save_backbone(nepa_plugin.load_backbone(TOY).set_order("hilbert"), tmp_path / "hilbert")
    own, published = toy_backbone(folder, attention="causal"), nepa_plugin.load_backbone(folder)
    assert own.vit.order == "hilbert"
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        tokens = published.get_intermediate_layers(images, [1], reshape=True)[0]
        torch.testing.assert_close(toy_backbone(folder, attention="causal", out_indices=[1])(images)[0], tokens)
    with pytest.raises(CheckpointError, match="order is hilbert, the config has raster"):
        toy_backbone(folder, model_args={**SIZE, "order": "raster"})


@pytest.mark.parametrize("details", [{"order": "hilbert"}, {"mlp_act": "silu"}, {"qk_norm": False}])
def test_a_checkpoint_of_a_backbone_of_other_details_is_refused(details):
    """They do not show in the shapes, and where the pretrained backbone is not, the config has to say them."""
    model = timm.create_model(ARCH, img_size=16, patch_size=4, **SIZE, **details)
    toy_backbone(None, model_args={**SIZE, **details}).check_built_as(backbone_config(model), "iter_9.pth")
    ((name, value),) = details.items()
    named = {"mlp_act": "activation is SiLU, the config has GELU"}.get(name, f"{name} is {value}, the config has")
    with pytest.raises(CheckpointError, match=rf"iter_9.pth is not .*: {named}.* Change arch, .* or model_args"):
        toy_backbone(None).check_built_as(backbone_config(model), "iter_9.pth")


def test_raw_weights_of_a_run_of_the_published_code(tmp_path):
    folder = shutil.copytree(TOY, tmp_path / "run")
    average = {k: 2 * v for k, v in load_file(TOY / "model.safetensors").items()}
    torch.save(average, folder / "pytorch_model_ema.bin")
    raw = nepa_plugin.load_backbone(TOY).norm.weight
    with pytest.warns(UserWarning, match="the average, is taken"):
        assert torch.equal(toy_backbone(folder).vit.norm.weight, 2 * raw)
    init_cfg = {"type": "Pretrained", "checkpoint": str(folder), "weights": "raw"}
    assert torch.equal(toy_backbone(init_cfg=init_cfg).vit.norm.weight, raw)


def damaged(tmp_path, change):
    model = nepa_plugin.load_backbone(TOY)
    state = model.state_dict()
    change(state)
    weights = {f"backbone.{k}": v for k, v in state.items()}
    torch.save({"state_dict": weights, BACKBONE_CONFIG_KEY: backbone_config(model)}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_a_missing_key_is_named(tmp_path):
    path = damaged(tmp_path, lambda state: state.pop("blocks.1.gamma_1"))
    with pytest.raises(CheckpointError, match=r"missing: blocks\.1\.gamma_1"):
        toy_backbone(path)


def test_a_wrong_shape_is_named(tmp_path):
    path = damaged(tmp_path, lambda state: state.update({"norm.weight": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"norm\.weight is \(3,\), the model has \(64,\)"):
        toy_backbone(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_args": {**SIZE, "num_heads": 4}}, "num_heads is 2, the config has 4"),
        ({"model_args": {**SIZE, "depth": 2}}, "depth is 3, the config has 2"),
        ({"arch": "vit_tiny_patch16_224"}, "class is NepaViT, the config has VisionTransformer"),
        ({"patch_size": None, "img_size": 28}, r"patch_size is \(4, 4\), the config has \(14, 14\)"),
        ({"model_args": {**SIZE, "rope_temperature": 7.0}}, "rope_temperature is 100.0, the config has 7.0"),
    ],
)
def test_another_architecture_is_named(arguments, message):
    with pytest.raises(CheckpointError, match=message):
        toy_backbone(**arguments)


def test_a_missing_checkpoint_is_an_error():
    with pytest.raises(FileNotFoundError, match="No checkpoint at no/such/folder"):
        toy_backbone("no/such/folder")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "nepa_vit_bas_patch14_224"}, "Did you mean nepa_vit_base_patch14_224"),
        ({"arch": "resnet18", "model_args": {}, "img_size": None, "patch_size": None}, "resnet18"),
        ({"out_indices": (0, 3)}, "has 3 blocks, 0 to 2"),
        ({"out_indices": (2, 0)}, "must be increasing"),
        ({"out_indices": ()}, "out_indices"),
        ({"attention": "diagonal"}, "'diagonal'"),
        ({"frozen_stages": 4}, "frozen_stages=4"),
        ({"init_cfg": {"type": "TruncNormal"}}, "takes dict"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        toy_backbone(**({"checkpoint": None} | arguments))


def test_causal_attention_is_refused_for_other_models():
    with pytest.raises(ValueError, match="only for NEPA"):
        TimmViT("vit_tiny_patch16_224", attention="causal", model_args={"depth": 1})


def test_other_vits_of_timm():
    model = TimmViT("vit_tiny_patch16_224", out_indices=(0, 1), model_args={"depth": 2}).eval()
    assert [m.shape for m in model(torch.zeros(1, 3, 100, 70))] == [(1, 192, 7, 5)] * 2


def test_other_vits_load_their_timm_folder_at_another_size(tmp_path):
    torch.manual_seed(0)
    trained = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0, global_pool="")
    nepa_plugin.save_backbone(trained, tmp_path / "vit")
    init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "vit")}
    model = TimmViT("vit_tiny_patch16_224", img_size=256, model_args={"depth": 2}, init_cfg=init_cfg)
    model.init_weights()
    assert model.vit.pos_embed.shape == (1, 257, 192)
    assert torch.equal(model.vit.blocks[1].attn.qkv.weight, trained.blocks[1].attn.qkv.weight)


def test_features_stay_aligned_with_an_image_that_the_patch_does_not_divide():
    """A centred blob must be centred in the map; padding at one side would shift it by half the padding."""
    model = toy_backbone(None, patch_size=14, img_size=28)
    embedding = model.vit.patch_embed.proj
    torch.nn.init.constant_(embedding.weight, 1.0)
    torch.nn.init.zeros_(embedding.bias)
    coordinate = torch.arange(100) - 49.5
    blob = torch.exp(-(coordinate[:, None] ** 2 + coordinate[None] ** 2) / (2 * 15**2))
    brightness = {}
    model.vit.patch_embed.register_forward_hook(lambda module, args, out: brightness.update(x=out))
    (maps,) = model(blob.expand(1, 3, 100, 100))
    assert maps.shape == (1, 64, 8, 8)
    mass = brightness["x"][0, ..., 0].detach()
    position = (torch.arange(8) + 0.5) / 8
    for axis in (0, 1):
        assert float((mass.sum(axis) * position).sum() / mass.sum()) == pytest.approx(0.5, abs=1e-4)


def test_patch_size_of_the_config_resamples_the_patch_embedding():
    model = toy_backbone(patch_size=8, img_size=32)
    assert model.vit.patch_embed.proj.weight.shape == (64, 3, 8, 8)
    reference = nepa_plugin.load_backbone(TOY)
    reference.set_input_size(32, 8)
    assert torch.equal(model.vit.patch_embed.proj.weight, reference.patch_embed.proj.weight)
    # the resampled filter sees a constant image as the original does
    small, large = toy_backbone()(torch.ones(1, 3, 16, 16)), model(torch.ones(1, 3, 32, 32))
    torch.testing.assert_close(small[0], large[0], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(("stages", "frozen_blocks"), [(-1, 0), (0, 0), (2, 2)])
def test_frozen_stages(stages, frozen_blocks):
    model = toy_backbone(frozen_stages=stages, drop_path_rate=0.5, final_norm=True).train()
    trained = {name for name, p in model.vit.named_parameters() if p.requires_grad}
    assert ("patch_embed.proj.weight" in trained) == ("cls_token" in trained) == (stages < 0)
    free = [i >= frozen_blocks for i in range(3)]
    assert [any(n.startswith(f"blocks.{i}.") for n in trained) for i in range(3)] == free
    assert [block.training for block in model.vit.blocks] == free


def test_every_trained_parameter_gets_a_gradient():
    model = toy_backbone(out_indices=(0, 1)).train()
    sum(maps.square().sum() for maps in model(torch.randn(2, 3, 16, 16))).backward()
    for name, parameter in model.vit.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert not any(p.requires_grad for p in model.vit.blocks[2].parameters())


def test_checkpointing_gives_the_same_gradients(monkeypatch):
    images, gradients, calls = torch.randn(2, 3, 16, 16), [], []
    import timm.models.eva as eva

    original = eva.checkpoint
    monkeypatch.setattr(eva, "checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k))
    for with_cp in (False, True):
        model = toy_backbone(with_cp=with_cp, model_args={**SIZE}).train()
        model.vit.rope.eval()  # its augmentation is random
        model(images)[0].square().sum().backward()
        gradients.append(model.vit.patch_embed.proj.weight.grad)
    torch.testing.assert_close(*gradients)
    assert len(calls) == 3
