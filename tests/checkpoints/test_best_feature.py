import json
import shutil

import pytest
import timm
import torch
from conftest import TOY

import nepa_plugin
from nepa_plugin import CheckpointError
from nepa_plugin.checkpoints import write_best_feature
from nepa_plugin.data import digits_folder
from nepa_plugin.evaluation import EvaluationOptions, LinearOptions, evaluate


def test_features_equal_the_published_states(toy, expected):
    """Depth by depth, causal: the fixture's states after every block, the last after the final norm."""
    images = expected["pixel_values"]
    torch.testing.assert_close(toy.extract_features(images, "embedding", "tokens"), expected["input_embedding"])
    for i in (1, 2):
        found = toy.extract_features(images, f"block {i}", "tokens")
        torch.testing.assert_close(found, expected[f"hidden_states.{i}"], atol=1e-5, rtol=1e-5)
    last = expected["last_hidden_state"]
    for pool, value in (("tokens", last), ("last", last[:, -1]), ("mean", last[:, 1:].mean(1))):
        found = toy.extract_features(images, "final norm", pool)
        torch.testing.assert_close(found, value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(toy.extract_features(images), last[:, 1:].mean(1), atol=1e-5, rtol=1e-5)
    toy.set_attention("bidirectional")
    found = toy.extract_features(images, pool="class")
    torch.testing.assert_close(found, expected["last_hidden_state_bidirectional"][:, 0], atol=1e-5, rtol=1e-5)


def test_what_there_is_not(toy, expected):
    images = expected["pixel_values"]
    with pytest.raises(ValueError, match=r"the class token sees only itself under causal attention\. Take 'last' or"):
        toy.extract_features(images, pool="class")
    for depth in ("block 0", "block 4", "norm"):
        with pytest.raises(ValueError, match="choose embedding, block 1 to block 3, or final norm"):
            toy.extract_features(images, depth)
    with pytest.raises(ValueError, match="choose mean, last, class or tokens"):
        toy.extract_features(images, pool="max")


def test_the_readout_finds_the_best_and_loading_takes_it(tmp_path):
    data = tmp_path / "data"
    for split, count in (("train", 20), ("val", 10)):
        for label in "05":
            (data / split / label).mkdir(parents=True)
            for file in sorted((digits_folder() / split / label).iterdir())[:count]:
                shutil.copy(file, data / split / label)
    torch.manual_seed(3)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 0.5}
    model = timm.create_model("nepa_vit_tiny_patch14_224", **sizes).eval()
    folder = nepa_plugin.save_backbone(model, tmp_path / "backbone")
    options = EvaluationOptions(k=3, accelerator="cpu", cache=False, num_workers=0, linear=LinearOptions(C=0.01))
    rows = evaluate(folder, data, ["readout"], options)["protocols"]["readout"]["rows"]
    single = [row for row in rows if row["pool"] != "concat"]
    best = next(row for row in single if row["held_out"] == max(row["held_out"] for row in single))
    kept = json.loads((folder / "readout.json").read_text())
    assert (kept["depth"], kept["pool"], kept["linear"]) == (best["depth"], best["pool"], best["linear"])
    assert kept["chosen_on"] == "held-out training images" and kept["data"] == str(data) and kept["classes"] == 2
    loaded = nepa_plugin.load_backbone(folder, feature="best")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.extract_features(images), model.extract_features(images, best["depth"], best["pool"]))
    assert torch.equal(nepa_plugin.load_backbone(folder).extract_features(images), model.extract_features(images))
    # other weights in the same place
    torch.nn.init.normal_(model.norm.weight)
    nepa_plugin.save_backbone(model, folder, overwrite=True)
    with pytest.raises(CheckpointError, match="is of other weights than"):
        nepa_plugin.load_backbone(folder, feature="best")


def test_no_readout_no_best_feature(toy, tmp_path):
    with pytest.raises(CheckpointError, match=r"does not say which feature is best.*--protocol readout"):
        nepa_plugin.load_backbone(TOY, feature="best")
    with pytest.raises(ValueError, match="feature='worst'"):
        nepa_plugin.load_backbone(TOY, feature="worst")
    folder = nepa_plugin.save_backbone(toy, tmp_path / "b")
    write_best_feature(folder, toy, "block 2", "last")
    assert nepa_plugin.load_backbone(folder, feature="best").best_feature == ("block 2", "last")
    (folder / "readout.json").write_text("{")
    with pytest.raises(ValueError, match=r"readout\.json is damaged"):
        nepa_plugin.load_backbone(folder, feature="best")
