"""Shipped configs by name."""

from pathlib import Path

import pytest

from nepa_plugin.runtime.shipped import FOLDERS, ShippedConfigError, configs, find, folder, named, summary
from nepa_plugin.training.configs import ConfigFileError, read_config

ROOT = Path(__file__).parents[2]


def test_in_a_checkout_they_are_the_checkouts():
    assert [folder(name) for name in FOLDERS] == [ROOT / name for name in FOLDERS]


def test_every_config_has_one_name():
    files = [p for name in FOLDERS for p in (ROOT / name).glob("*.*") if p.stem != "base"]
    assert sorted(configs().values()) == sorted(files) and set(configs()) == {path.stem for path in files}
    assert set(configs("mmseg_configs")) == {path.stem for path in (ROOT / "mmseg_configs").glob("*.py")}


@pytest.mark.parametrize(
    "name", ["nepa_demo", "nepa_demo.yaml", "lightly_configs/nepa_demo", "lightly_configs/nepa_demo.yaml"]
)
def test_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find(name) == find(name, "lightly_configs") == ROOT / "lightly_configs" / "nepa_demo.yaml"


@pytest.mark.parametrize("name", ["nepa_demo", "lightly_configs/nepa_demo.yaml"])
def test_a_file_of_that_name_is_found_first(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("a: 1")
    assert find(name) == Path(name)
    assert named(name) == ROOT / "lightly_configs" / "nepa_demo.yaml"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("nepa_dmo", "The nearest: nepa_demo, nepa_digits. "),
        ("nepa_demo.yml", "The nearest: nepa_demo, "),
        ("mine/nepa_demo.yaml", "The nearest: nepa_demo, "),  # another folder was meant
        ("mmseg_configs/nepa_demo.yaml", "The nearest: nepa_demo, "),
        ("zzz", ""),
    ],
)
def test_an_unknown_name_names_the_nearest(name, nearest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ShippedConfigError) as error:
        find(name)
    text = str(error.value)
    assert text.startswith(f"No config file at {name}, and no shipped config of that name. {nearest}")
    assert text.endswith("`nepa configs` lists them.") and "\n" not in text


@pytest.mark.parametrize("name", configs())
def test_every_config_says_what_it_is(name):
    assert 10 < len(summary(configs()[name])) < 140


def test_summary_is_the_first_sentence(tmp_path):
    (tmp_path / "a.yaml").write_text("# ViT-B/14 for 1.5 epochs,\n# on images. More of it.\n\n# Not this.\na: 1\n")
    assert summary(tmp_path / "a.yaml") == "ViT-B/14 for 1.5 epochs, on images"
    (tmp_path / "b.py").write_text("# Testing:\n# mim test b.py\n")
    assert summary(tmp_path / "b.py") == "Testing"


def test_a_config_of_ones_own_builds_on_a_shipped_one(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: nepa_demo\ntrainer: {max_epochs: 3}\n")
    config = read_config(tmp_path / "mine.yaml")
    assert config["trainer"]["max_epochs"] == 3 and config["global_batch_size"] == 128
    (tmp_path / "mine.yaml").write_text("base: nepa_dmo\n")
    with pytest.raises(ConfigFileError, match=r"No config file at .*nepa_dmo, which .*mine.yaml names as its `base`"):
        read_config(tmp_path / "mine.yaml")
