"""Every kind of file that the published code writes, made from the toy fixtures: what loads, and what it computes."""

import json
import shutil

import pytest
import timm
import torch
from conftest import TOY, TOY_CLASSIFIER
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import gelu, linear, silu

import nepa_plugin
from nepa_plugin import CheckpointError, NepaViT
from nepa_plugin.checkpoints import class_names, name_classes

LAYER = "vit_nepa.encoder.layer."


def variant(tmp_path, source=TOY, change=None, drop=(), **config):
    """Copy a fixture with another config, without the keys in ``drop``, and with its weights changed."""
    folder = tmp_path / "published"
    folder.mkdir()
    state = load_file(source / "model.safetensors")
    save_file(change(state) if change else state, folder / "model.safetensors")
    original = json.loads((source / "config.json").read_text())
    content = {key: value for key, value in (original | config).items() if key not in drop}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def again(model, tmp_path, layout):
    return nepa_plugin.load_backbone(nepa_plugin.save_backbone(model, tmp_path / f"again-{layout}", layout=layout))


# -- a run folder of the published code --------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_average_is_taken_and_said(tmp_path, wrapped):
    folder = shutil.copytree(TOY, tmp_path / "run")
    average = {key: value + 1 for key, value in load_file(TOY / "model.safetensors").items()}
    torch.save({"state_dict": average} if wrapped else average, folder / "pytorch_model_ema.bin")
    raw = nepa_plugin.load_backbone(TOY).state_dict()
    with pytest.warns(UserWarning, match=r"pytorch_model_ema\.bin, the average, is taken.* weights='raw'"):
        found = nepa_plugin.load_backbone(folder).state_dict()
    assert all(torch.equal(found[key], raw[key] + 1) for key in raw)
    for source, arguments in ((folder, {"weights": "raw"}), (folder / "model.safetensors", {})):
        found = nepa_plugin.load_backbone(source, **arguments).state_dict()
        assert all(torch.equal(found[key], raw[key]) for key in raw)
    (folder / "model.safetensors").unlink()
    assert torch.equal(nepa_plugin.load_backbone(folder).norm.bias, raw["norm.bias"] + 1)
    assert torch.equal(nepa_plugin.load_backbone(folder / "pytorch_model_ema.bin").norm.bias, raw["norm.bias"] + 1)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        nepa_plugin.load_backbone(folder, weights="raw")
    with pytest.raises(ValueError, match="weights='best' is neither 'average' nor 'raw'"):
        nepa_plugin.load_backbone(folder, weights="best")


class Bomb:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("content", "message"), [(Bomb(), "cannot be read"), ([1], "no mapping"), ({"x": 1}, "no map")]
)
def test_an_average_that_is_no_state_dict(tmp_path, capsys, content, message):
    folder = shutil.copytree(TOY, tmp_path / "run")
    torch.save(content, folder / "pytorch_model_ema.bin")
    with pytest.raises(CheckpointError, match=message), pytest.warns(match="the average"):
        nepa_plugin.load_backbone(folder)
    assert "executed" not in capsys.readouterr().out


def shards(tmp_path):
    folder = shutil.copytree(TOY, tmp_path / "shards")
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    files = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for file, keys in files.items():
        save_file({key: state[key] for key in keys}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {key: file for file, keys in files.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder, index


def test_weights_in_shards(tmp_path, monkeypatch):
    folder, _ = shards(tmp_path)
    expected = nepa_plugin.load_backbone(TOY).state_dict()
    found = nepa_plugin.load_backbone(folder).state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)

    from huggingface_hub.errors import EntryNotFoundError

    def fetch(repo, name, revision=None):
        if not (folder / name).is_file():
            raise EntryNotFoundError(name)
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    found = nepa_plugin.load_backbone("someone/nepa").state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_shards_that_do_not_go_together(tmp_path):
    folder, index = shards(tmp_path)

    def fails(error, message, weight_map):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(error, match=message):
            nepa_plugin.load_backbone(folder)

    fails(CheckpointError, "does not say which file holds which tensor", [1])
    fails(CheckpointError, "which is not beside it", index["weight_map"] | {"x": "../other.safetensors"})
    fails(FileNotFoundError, r"third\.safetensors is missing, which", index["weight_map"] | {"x": "third.safetensors"})
    fails(CheckpointError, "its shards miss x", index["weight_map"] | {"x": "model-00001-of-00002.safetensors"})


# -- options of the published config -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["timm", "nepa"])
def test_a_classifier_without_pooling_reads_the_last_token(tmp_path, layout):
    def without_norm(state):
        return {key: value for key, value in state.items() if not key.startswith("fc_norm.")}

    folder = variant(tmp_path, TOY_CLASSIFIER, without_norm, add_pooling_layer=False)
    images = load_file(TOY_CLASSIFIER / "expected.safetensors")["pixel_values"]
    model = nepa_plugin.load_backbone(folder)
    tokens = nepa_plugin.load_backbone(TOY_CLASSIFIER).forward_features(images)
    state = load_file(TOY_CLASSIFIER / "model.safetensors")
    logits = linear(tokens[:, -1], state["classifier.weight"], state["classifier.bias"])
    torch.testing.assert_close(model(images), logits)
    same = again(model, tmp_path, layout)
    assert torch.equal(same(images), model(images))
    if layout == "nepa":
        config = json.loads((tmp_path / "again-nepa" / "config.json").read_text())
        assert config["add_pooling_layer"] is False
    else:
        assert torch.equal(
            timm.create_model(f"local-dir:{tmp_path / 'again-timm'}", pretrained=True).eval()(images), logits
        )


@pytest.mark.parametrize("layout", ["timm", "nepa"])
def test_folded_layer_scale(tmp_path, expected, layout):
    def folded(state):
        for i in range(3):
            for scale, dense in (("layer_scale", "attention.output.dense"), ("output.layer_scale", "output.dense")):
                factor = state.pop(f"{LAYER}{i}.{scale}.lambda1")
                state[f"{LAYER}{i}.{dense}.weight"] *= factor[:, None]
                state[f"{LAYER}{i}.{dense}.bias"] *= factor
        return state

    model = nepa_plugin.load_backbone(variant(tmp_path, change=folded, layerscale_value=None))
    assert all(block.gamma_1 is None and block.gamma_2 is None for block in model.blocks)
    for network in (model, again(model, tmp_path, layout)):
        found = network.predict_next(expected["pixel_values"])[1]
        torch.testing.assert_close(found, expected["last_hidden_state"], atol=1e-5, rtol=1e-5)


def gate(state):
    generator = torch.Generator().manual_seed(0)
    for i in range(3):
        up = state[f"{LAYER}{i}.intermediate.up_proj.weight"]
        state[f"{LAYER}{i}.intermediate.gate_proj.weight"] = torch.randn(up.shape, generator=generator) / 8
        state[f"{LAYER}{i}.intermediate.gate_proj.bias"] = torch.randn(len(up), generator=generator)
    return state


@pytest.mark.parametrize("layout", ["timm", "nepa"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("name", "function"), [("gelu", gelu), ("silu", silu)])
def test_activation_and_gate_are_independent(tmp_path, gated, name, function, layout):
    folder = variant(tmp_path, change=gate if gated else None, hidden_act=name, use_gated_mlp=gated)
    state = load_file(folder / "model.safetensors")
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))

    def layer(part):
        return state[f"{LAYER}1.{part}.weight"], state[f"{LAYER}1.{part}.bias"]

    hidden = linear(x, *layer("intermediate.up_proj"))
    hidden = function(linear(x, *layer("intermediate.gate_proj"))) * hidden if gated else function(hidden)
    expected = linear(hidden, *layer("output.dense"))
    model = nepa_plugin.load_backbone(folder)
    for network in (model, again(model, tmp_path, layout)):
        torch.testing.assert_close(network.blocks[1].mlp(x), expected)


def test_what_a_config_leaves_out_has_the_published_default(tmp_path):
    absent = ("qk_norm", "qk_norm_affine", "pos_embed_rescale", "layerscale_value", "hidden_act", "use_gated_mlp")
    model = nepa_plugin.load_backbone(variant(tmp_path, drop=absent))
    block = model.blocks[0]
    assert isinstance(block.attn.q_norm, nn.Identity) and isinstance(block.attn.k_norm, nn.Identity)
    assert model.rope.rescale_coords == 2.0 and block.init_values == 1e-5
    assert isinstance(block.mlp.act, nn.GELU) and block.mlp.fc1.out_features == 256
    config = nepa_plugin.checkpoints.published.to_nepa(model)[0]
    assert (config["qk_norm"], config["qk_norm_affine"]) == (False, False)


def test_a_classifier_that_does_not_say_how_it_pools(tmp_path):
    with pytest.raises(CheckpointError, match="unexpected: fc_norm"):  # the default is the last token, without a norm
        nepa_plugin.load_backbone(variant(tmp_path, TOY_CLASSIFIER, drop=("add_pooling_layer",)))


def test_a_mask_token_is_left_out_with_a_word(tmp_path, expected):
    folder = variant(tmp_path, change=lambda state: state | {"vit_nepa.embeddings.mask_token": torch.ones(1, 1, 64)})
    with pytest.warns(UserWarning, match="mask_token is left out"):
        model = nepa_plugin.load_backbone(folder)
    found = model.predict_next(expected["pixel_values"])[1]
    torch.testing.assert_close(found, expected["last_hidden_state"], atol=1e-5, rtol=1e-5)


def test_pooling_that_the_published_layout_does_not_have(tmp_path):
    model = NepaViT(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=3, use_fc_norm=False)
    with pytest.raises(CheckpointError, match="no classifier with global_pool='avg' and use_fc_norm=False"):
        nepa_plugin.save_backbone(model, tmp_path / "x", layout="nepa")
    with pytest.raises(ValueError, match=r"mlp_act='relu' is not one of \('gelu', 'silu'\)"):
        NepaViT(mlp_act="relu", depth=1)


# -- class names -------------------------------------------------------------------------------------------------------

NAMES = ["crane", "tench", "crane", "goldfish", "ray", "hen", "café"]


def test_class_names_travel(tmp_path):
    labels = {str(i): name for i, name in enumerate(NAMES)}
    folder = variant(tmp_path, TOY_CLASSIFIER, id2label=dict(reversed(labels.items())))
    model = nepa_plugin.load_backbone(folder)
    assert class_names(model) == NAMES
    assert class_names(again(model, tmp_path, "timm")) == NAMES
    assert class_names(timm.create_model(f"local-dir:{tmp_path / 'again-timm'}", pretrained=True)) == NAMES
    assert class_names(again(model, tmp_path, "nepa")) == NAMES
    assert json.loads((tmp_path / "again-nepa" / "config.json").read_text())["id2label"] == labels
    assert class_names(nepa_plugin.load_backbone(folder, num_classes=7)) == NAMES
    model.reset_classifier(3)
    assert class_names(model) is None
    name_classes(model, ["a", "b", "c"])
    assert class_names(model) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="2 names for 3 classes"):
        name_classes(model, ["a", "b"])


@pytest.mark.parametrize("labels", [{"0": "a", "2": "b"}, ["a", "b"], {"a": 0}])
def test_class_names_without_an_order(tmp_path, labels):
    with pytest.raises(CheckpointError, match=r"id2label .* must map 0, 1, \.\.\. to names"):
        nepa_plugin.load_backbone(variant(tmp_path, TOY_CLASSIFIER, id2label=labels))


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_only_the_large_predictors_qk_norm_has_a_weight():
    for size in ("tiny", "small", "base", "large", "huge"):
        for mlp in ("", "_swiglu"):
            model = timm.create_model(f"nepa_vit_{size}_patch14{mlp}_224", depth=1, img_size=28)
            assert (model.blocks[0].attn.q_norm.weight is not None) == (size == "large")
            assert model.blocks[0].attn.q_norm.bias is None


def test_a_large_backbone_of_before_still_loads(tmp_path):
    """Its QK-norm had no weight, and its config does not say so."""
    small = {"depth": 1, "img_size": 28, "embed_dim": 64, "num_heads": 2}
    model = timm.create_model("nepa_vit_large_patch14_224", qk_norm_affine=False, **small).eval()
    nepa_plugin.save_backbone(model, tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["model_args"]["qk_norm_affine"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    images = torch.randn(1, 3, 28, 28)
    assert torch.equal(nepa_plugin.load_backbone(tmp_path / "old")(images), model(images))
