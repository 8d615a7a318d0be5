from pathlib import Path

import pytest

from nepa_plugin.training.configs import ConfigFileError, merge, read_config

CONFIGS = Path(__file__).parents[2] / "lightly_configs"


def test_values_of_the_leaf_win_and_mappings_are_merged(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "root.yaml").write_text("a: 1\nm: {x: 1, y: {z: 2, w: 3}}\nl: [1, 2]\n")
    (tmp_path / "sub" / "middle.yaml").write_text("base: ../root.yaml\nm: {y: {w: 4}}\nb: 1e-3\n")
    (tmp_path / "leaf.yaml").write_text("base: sub/middle.yaml\na: null\nl: [3]\n")
    assert read_config(tmp_path / "leaf.yaml") == {
        "a": None,
        "b": 0.001,
        "l": [3],
        "m": {"x": 1, "y": {"z": 2, "w": 4}},
    }


def test_merge_leaves_its_arguments_alone():
    base, over = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert merge(base, over) == {"a": {"b": 1, "c": 2}}
    assert base == {"a": {"b": 1}} and over == {"a": {"c": 2}}


def test_a_shipped_config():
    config = read_config(CONFIGS / "nepa_demo.yaml")
    assert config["model"]["class_path"] == "nepa_plugin.methods.NEPA"
    assert config["model"]["init_args"]["backbone_args"] == {"embed_dim": 128, "depth": 4, "num_heads": 4}
    assert config["model"]["init_args"]["base_lr"] == 2e-3 and config["trainer"]["max_epochs"] == 60


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: gone.yaml", r"No config file at .*gone.yaml, which .*c.yaml names as its `base`"),
        ("base: c.yaml", "builds on itself"),
        ("base: [a, b]", "must be the path of one file"),
        ("- 1\n- 2", "must hold a mapping of options, not a list"),
        ("a: [1", "is no YAML file"),
    ],
)
def test_bad_files(text, message, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigFileError, match=message):
        read_config(tmp_path / "c.yaml")
