import json
import re
import shutil

import pytest
import timm
import torch
from conftest import TOY, TOY_CLASSIFIER
from safetensors.torch import load_file, save_file

import nepa_plugin
from nepa_plugin import CheckpointError, NepaViT
from nepa_plugin.checkpoints import BACKBONE_CONFIG_KEY, backbone_config, load_weights, untrained_like


def same(a, b):
    a, b = (m if isinstance(m, dict) else m.state_dict() for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_timm_folder_round_trip(toy, tmp_path, expected):
    toy.set_attention("bidirectional")
    nepa_plugin.save_backbone(toy, tmp_path / "b")
    for model in (
        nepa_plugin.load_backbone(tmp_path / "b"),
        timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True).eval(),
    ):
        assert same(model, toy) and model.attention == "bidirectional"
        assert torch.equal(model(expected["pixel_values"]), toy(expected["pixel_values"]))


@pytest.mark.parametrize("folder", [TOY, TOY_CLASSIFIER])
def test_published_round_trip_is_bit_exact(folder, tmp_path):
    nepa_plugin.save_backbone(nepa_plugin.load_backbone(folder), tmp_path / "out", layout="nepa")
    assert same(load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors"))
    configs = [json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "out")]
    assert configs[0] == configs[1]


def test_published_layout_of_a_gated_mlp(tmp_path):
    model = NepaViT(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, swiglu_mlp=True, mlp_ratio=2.0)
    nepa_plugin.save_backbone(model, tmp_path / "g", layout="nepa")
    published = load_file(tmp_path / "g" / "model.safetensors")
    gate = published["vit_nepa.encoder.layer.1.intermediate.gate_proj.weight"]
    assert torch.equal(gate, model.blocks[1].mlp.fc1.weight[:64])
    assert same(nepa_plugin.load_backbone(tmp_path / "g"), model)


def test_sources(toy, tmp_path, monkeypatch):
    assert same(nepa_plugin.load_backbone(TOY / "model.safetensors"), toy)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name, revision=None: str(TOY / name))
    assert same(nepa_plugin.load_backbone("someone/nepa"), toy)
    state = {"backbone." + k: v for k, v in toy.state_dict().items()} | {"online_classifier.x": torch.zeros(1)}
    torch.save({"state_dict": state, BACKBONE_CONFIG_KEY: backbone_config(toy)}, tmp_path / "a.ckpt")
    assert same(nepa_plugin.load_backbone(tmp_path / "a.ckpt"), toy)


def test_hub_failure_and_revision(toy, monkeypatch):
    asked = []

    def download(repo, name, revision=None):
        asked.append((repo, name, revision))
        if revision == "gone":
            raise OSError("no network")
        return str(TOY / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert same(nepa_plugin.load_backbone("hf-hub:someone/nepa@v1"), toy)
    assert asked == [("someone/nepa", name, "v1") for name in ("config.json", "model.safetensors")]
    with pytest.raises(FileNotFoundError, match=r"could not be fetched.*no network"):
        nepa_plugin.load_backbone("someone/nepa@gone")


@pytest.mark.parametrize("layout", ["timm", "nepa"])
def test_attention_mode_is_recorded(toy, tmp_path, layout, expected):
    nepa_plugin.save_backbone(toy.set_attention("bidirectional"), tmp_path / "b", layout=layout)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["model_args"]["attention"] == "bidirectional" if layout == "timm" else config["is_causal"] is False
    output = nepa_plugin.load_backbone(tmp_path / "b")(expected["pixel_values"])
    assert torch.equal(output, toy(expected["pixel_values"]))


def test_changes_after_construction_are_recorded(toy, tmp_path):
    toy.set_input_size(img_size=32, patch_size=8)
    toy.reset_classifier(7)
    nepa_plugin.save_backbone(toy, tmp_path / "head")
    model = nepa_plugin.load_backbone(tmp_path / "head")
    assert same(model, toy) and model(torch.randn(1, 3, 32, 32)).shape == (1, 7)


def test_a_removed_head_leaves_its_norm(tmp_path):
    model = nepa_plugin.load_backbone(TOY_CLASSIFIER)
    model.reset_classifier(0)
    nepa_plugin.save_backbone(model, tmp_path / "b")
    pooled, images = nepa_plugin.load_backbone(tmp_path / "b"), torch.randn(2, 3, 16, 16)
    assert same(pooled, model) and "fc_norm.weight" in pooled.state_dict()
    assert pooled(images).shape == (2, 64) and torch.equal(pooled(images), model(images))


def test_overrides(toy):
    model = nepa_plugin.load_backbone(TOY, img_size=32, attention="bidirectional", drop_path_rate=0.1)
    assert same(model, toy) and model(torch.randn(1, 3, 32, 32)).shape == (1, 65, 64) and not model.is_causal


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("norm.bias"), "missing: norm.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected: extra"),
        (lambda s: s.update({"norm.bias": torch.zeros(3)}), r"norm.bias is \(3,\), the model has \(64,\)"),
    ],
)
def test_all_or_nothing(toy, tmp_path, edit, message):
    nepa_plugin.save_backbone(toy, tmp_path / "b")
    state = load_file(tmp_path / "b" / "model.safetensors")
    edit(state)
    save_file(state, tmp_path / "b" / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        nepa_plugin.load_backbone(tmp_path / "b")
    before = {k: v.clone() for k, v in toy.state_dict().items()}
    state["cls_token"] += 1
    with pytest.raises(CheckpointError, match=message):
        load_weights(toy, state, "b")
    assert same(toy, before)


def test_a_missing_part_of_a_fused_tensor_is_named(tmp_path):
    shutil.copytree(TOY, tmp_path / "t")
    state = load_file(TOY / "model.safetensors")
    del state["vit_nepa.encoder.layer.1.attention.attention.key.weight"]
    save_file(state, tmp_path / "t" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layer\.1\.attention\.attention\.key\.weight"):
        nepa_plugin.load_backbone(tmp_path / "t")


def test_damaged_and_missing(tmp_path):
    shutil.copytree(TOY, tmp_path / "t")
    (tmp_path / "t" / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="damaged"):
        nepa_plugin.load_backbone(tmp_path / "t")
    with pytest.raises(FileNotFoundError, match="No checkpoint at"):
        nepa_plugin.load_backbone(tmp_path / "nothing")
    (tmp_path / "t" / "config.json").write_text('{"model_type": "bert"}')
    shutil.copy(TOY / "model.safetensors", tmp_path / "t" / "model.safetensors")
    with pytest.raises(CheckpointError, match="neither a timm config"):
        nepa_plugin.load_backbone(tmp_path / "t")


@pytest.mark.parametrize(
    ("config", "message"),
    [("[]", "neither a timm config"), ("\xff", "damaged"), ('{"model_type": "vit_nepa"}', "misses image_size")],
)
def test_bad_configs(tmp_path, config, message):
    shutil.copytree(TOY, tmp_path / "t")
    (tmp_path / "t" / "config.json").write_text(config, encoding="latin-1")
    with pytest.raises(CheckpointError, match=message):
        nepa_plugin.load_backbone(tmp_path / "t")


def set_to(path, **values):
    config = json.loads(path.read_text())
    config.get("model_args", config).update(values)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depth": 10**8}, "depth = 100000000 in its config, but its weights allow 3 at most"),
        ({"embed_dim": 10**7}, "embed_dim = 10000000 in its config, but its weights allow"),
        ({"embed_dim": "64"}, "embed_dim = '64' in its config is no whole number"),
        ({"num_heads": 0}, "num_heads = 0 in its config; at least 1"),
        ({"num_heads": 7}, "embed_dim = 64 in its config is not a multiple of num_heads = 7"),
        ({"depth": 2.5}, "depth = 2.5 in its config is no whole number"),
        ({"img_size": 32768, "patch_size": 1}, "images of 32768 pixels in patches of 1 are too many"),
        ({"mlp_ratio": "much"}, "mlp_ratio = 'much'"),
        ({"colour": "blue"}, "cannot build .* unexpected keyword argument 'colour'"),
        ({"checkpoint_path": "/etc/passwd"}, "checkpoint_path, which opens another place"),
        ({"pretrained_cfg": {"url": "https://example.org"}}, "pretrained_cfg, which opens another place"),
        ({"attention": "sideways"}, "cannot build .*sideways"),
    ],
)
def test_a_config_that_cannot_be_of_these_weights(toy, tmp_path, values, message):
    nepa_plugin.save_backbone(toy, tmp_path / "b")
    set_to(tmp_path / "b" / "config.json", **values)
    with pytest.raises(CheckpointError, match=message) as error:
        nepa_plugin.load_backbone(tmp_path / "b")
    assert str(error.value).startswith(f"{tmp_path / 'b'}: ")


@pytest.mark.parametrize("arch", ["hf-hub:owner/name", "local-dir:/etc", "no_such_network", 5, None])
def test_an_architecture_is_a_name_that_timm_knows(toy, tmp_path, arch):
    nepa_plugin.save_backbone(toy, tmp_path / "b")
    path = tmp_path / "b" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architecture": arch}))
    with pytest.raises(CheckpointError, match=f"{re.escape(repr(arch))} is no architecture that timm"):
        nepa_plugin.load_backbone(tmp_path / "b")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 10**8}, "depth = 100000000 in its config, but its weights allow"),
        ({"hidden_size": "64"}, "hidden_size of the published NEPA config must be a positive whole number, not '64'"),
        ({"hidden_size": 0}, "not 0"),
        ({"num_attention_heads": None}, "not None"),
    ],
)
def test_a_published_config_that_cannot_be_of_these_weights(tmp_path, values, message):
    shutil.copytree(TOY, tmp_path / "t")
    set_to(tmp_path / "t" / "config.json", **values)
    with pytest.raises(CheckpointError, match=message):
        nepa_plugin.load_backbone(tmp_path / "t")


@pytest.mark.parametrize("state", [None, [1], {1: torch.zeros(1)}, {"a": 1}, torch.zeros(1)])
def test_weights_that_are_no_mapping_of_tensors(toy, tmp_path, state):
    content = {"state_dict": state, BACKBONE_CONFIG_KEY: {"architecture": "nepa_vit_base_patch14_224"}}
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"a\.ckpt: its 'state_dict' is no mapping of names to tensors"):
        nepa_plugin.load_backbone(tmp_path / "a.ckpt")


@pytest.mark.parametrize("content", [b"", b"abc", b"\x80\x02"])
def test_damaged_training_checkpoint(tmp_path, content):
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.ckpt cannot be read"):
        nepa_plugin.load_backbone(tmp_path / "a.ckpt")


@pytest.mark.parametrize("extra", [{}, {BACKBONE_CONFIG_KEY: {}}])
def test_training_checkpoint_without_its_config(tmp_path, extra):
    torch.save({"state_dict": {}} | extra, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="does not say how to build its backbone"):
        nepa_plugin.load_backbone(tmp_path / "a.ckpt")


def test_a_model_without_a_timm_name(small, tmp_path):
    with pytest.raises(CheckpointError, match="not built by name"):
        nepa_plugin.save_backbone(small, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    nepa_plugin.save_backbone(small, tmp_path / "n", layout="nepa")
    assert same(nepa_plugin.load_backbone(tmp_path / "n"), small)


class _Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_pickle_is_executed(tmp_path):
    torch.save({"state_dict": {}, "x": _Attack(tmp_path / "hacked")}, tmp_path / "a.ckpt")
    torch.save(_Attack(tmp_path / "control"), tmp_path / "c.ckpt")
    torch.load(tmp_path / "c.ckpt", weights_only=False).close()
    assert (tmp_path / "control").exists()  # the attack works where unpickling is allowed
    with pytest.raises(CheckpointError, match=r"tensors only: it holds a .*open, and unpickling that") as error:
        nepa_plugin.load_backbone(tmp_path / "a.ckpt")
    assert "weights_only" not in str(error.value)  # torch's advice would execute it
    assert not (tmp_path / "hacked").exists()


def test_nothing_is_overwritten(toy, tmp_path):
    nepa_plugin.save_backbone(toy, tmp_path / "b")
    with pytest.raises(FileExistsError, match="exists"):
        nepa_plugin.save_backbone(toy, tmp_path / "b")


def test_untrained_like(toy):
    state = torch.get_rng_state()
    fresh = untrained_like(toy)
    assert not torch.equal(fresh.patch_embed.proj.weight, toy.patch_embed.proj.weight)
    assert torch.equal(state, torch.get_rng_state()) and fresh.embed_dim == 64
