"""Files of runs that somebody else has made: what they say stays text, and inside of the folder."""

import json
from pathlib import Path

import pytest
import timm
import torch

import nepa_plugin
from nepa_plugin.comparison import Comparison, Run, floors, plan
from nepa_plugin.comparison.plan import folder_name
from nepa_plugin.comparison.report import accuracy_table, write_report

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.fixture
def finished(tmp_path):
    """A finished run, as far as the untrained backbones look at it."""
    torch.manual_seed(0)
    model = timm.create_model("nepa_vit_tiny_patch14_224", **SIZES)
    nepa_plugin.save_backbone(model, tmp_path / "run" / "backbone")
    config = json.loads((tmp_path / "run" / "backbone" / "config.json").read_text())
    summary = {"backbone_class": "NepaViT", "attention": "causal", "backbone": config}
    return Run("mine", 0, tmp_path / "run", summary)


@pytest.mark.parametrize("name", ["../../escaped", "/../../../escaped", "..", "a/b", "x\0y"])
def test_a_class_name_does_not_write_outside_of_the_folder(finished, tmp_path, name):
    finished.summary["backbone_class"] = name
    out = tmp_path / "deep" / "er" / "out"
    before = sorted(tmp_path.rglob("*"))
    (floor,) = floors.untrained([finished], Comparison([], out, "digits", ["knn"], [0]))
    new = [path for path in tmp_path.rglob("*") if path not in before and path.is_file()]
    assert len(new) == 2 and all(path.resolve().is_relative_to(out.resolve() / "untrained") for path in new)
    assert floor.folder.parent.parent == out / "untrained"


@pytest.mark.parametrize(
    ("name", "folder"),
    [("nepa_digits", "nepa_digits"), ("my run", "my run"), ("..", "_"), ("../a", "_a"), ("", "_"), ("a\\b\n", "a_b_")],
)
def test_folder_names(name, folder):
    assert folder_name(name) == folder and Path("x", folder_name(name)).parent == Path("x")


def test_markup_in_names_and_errors_is_text(tmp_path):
    runs = [
        Run("<b>[x](http://e) | `c` *d*</b>", 0, tmp_path, results={"knn": {"top1": 50.0}}),
        Run("[/bold]", 0, tmp_path, error="# <script>alert(1)</script>\n\n# [link](x)"),
    ]
    write_report(runs, tmp_path, "nepa ```\n# heading", "<i>\n# title")
    markdown = (tmp_path / "report.md").read_text()
    lines = markdown.splitlines()
    assert lines[0] == r"# &lt;i&gt; \# title" and "````" in lines and "<script>" not in markdown
    assert r"| &lt;b&gt;\[x\](http://e) \| \`c\` \*d\*&lt;/b&gt; | 1 | **50.0** |" in lines
    assert r"- \[/bold\], seed 0: \# &lt;script&gt;alert(1)&lt;/script&gt; \# \[link\](x)" in lines
    assert "<script>" not in (tmp_path / "report.html").read_text()


def test_markup_in_names_does_not_stop_the_table(tmp_path, capsys):
    from rich.console import Console

    runs = [Run("[/bold] [red]x", 0, tmp_path, results={"knn": {"top1": 50.0}})]
    for markup in (True, False):
        Console(width=140, markup=markup).print(accuracy_table(runs).as_rich())
        printed = capsys.readouterr().out
        assert "[/bold] [red]x" in printed and "[bold]" not in printed.replace("[/bold] [red]x", "")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"its aliases stand for more than 100,000 values\. Write them out"),
        ("a: &a [*a]", "line 1: an alias stands for what it is part of"),
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", "line 5: the key `c` is there twice"),
        ("x" * (2**20 + 1), "has more than 1,048,576 bytes"),
        ("[" * 5000, "nested too deeply"),
        ("a: [1", "is no YAML file"),
        ("a: \xff", "is no text in UTF-8"),
    ],
)
def test_configs_are_read_with_bounds(tmp_path, text, message):
    from nepa_plugin.training.configs import ConfigFileError, read_config

    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigFileError, match=f"config.yaml.*{message}") as error:
        read_config(path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=f"config.yaml.*{message}"):
        plan._read_config(path)


def test_aliases_within_bounds_and_merge_keys_are_read(tmp_path):
    from nepa_plugin.training.configs import read_config

    (tmp_path / "a.yaml").write_text("x: &x {lr: 1e-3}\ny: *x\nz:\n  <<: *x\n  wd: 1\n")
    assert read_config(tmp_path / "a.yaml") == {"x": {"lr": 1e-3}, "y": {"lr": 1e-3}, "z": {"lr": 1e-3, "wd": 1}}
