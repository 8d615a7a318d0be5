"""The `nepa` command: its list, its sub-commands by name, and a sub-command in two processes."""

import importlib
import re
import subprocess
import sys

import pytest
from pretraining import FAST

import nepa_command as nepa
from nepa_plugin.runtime import shipped

NEPA = [sys.executable, "-m", "nepa_command"]


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/nepa", *map(str, args)])
    nepa.main()


def test_the_list_has_a_line_for_each_command(monkeypatch, capsys):
    call(monkeypatch)
    printed = capsys.readouterr().out
    for name, (_, line) in nepa.COMMANDS.items():
        assert f"  {name:{max(map(len, nepa.COMMANDS))}}  {line}\n" in printed
    call(monkeypatch, "--help")
    assert capsys.readouterr().out == printed


def test_the_list_needs_no_import_of_the_package():
    code = "import sys, nepa_command; nepa_command.main(); print(*{'nepa_plugin', 'torch', 'timm'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: nepa COMMAND") and result.stdout.endswith("options.\n\n")


def test_version(monkeypatch, capsys):
    call(monkeypatch, "--version")
    assert capsys.readouterr().out == "0.1.0\n"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("evalute", "error: there is no command `nepa evalute`; did you mean `nepa evaluate`?\n"),
        ("xyz", "error: there is no command `nepa xyz`; `nepa --help` lists the commands.\n"),
    ],
)
def test_an_unknown_command_is_one_line(name, line, monkeypatch, capsys):
    with pytest.raises(SystemExit) as status:
        call(monkeypatch, name)
    assert status.value.code == 2 and capsys.readouterr().err == line


@pytest.mark.parametrize("name", nepa.COMMANDS)
def test_each_command_calls_itself_nepa(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as status:
        call(monkeypatch, name, "--help")
    printed = capsys.readouterr().out
    assert status.value.code == 0 and printed.startswith(f"usage: nepa {name} ")
    assert sys.argv == ["/somewhere/bin/nepa", name, "--help"]
    module = importlib.import_module(f"nepa_plugin.commands.{nepa.COMMANDS[name][0]}")
    assert f"nepa {name} " in module.__doc__ and "python tools/" not in module.__doc__


def test_configs_lists_all_and_prints_the_path_of_one(monkeypatch, capsys):
    call(monkeypatch, "configs")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(shipped.configs())
    assert f"  {'nepa_vit_b':28}  NEPA ViT-B/14 on ImageNet-1K, published recipe" in lines
    call(monkeypatch, "configs", "nepa_vit_b_ade20k")
    assert capsys.readouterr().out == f"{shipped.configs()['nepa_vit_b_ade20k']}\n"
    with pytest.raises(SystemExit, match=r"error: No config file at nepa_vitb, .* The nearest: nepa_vit_b, "):
        call(monkeypatch, "configs", "nepa_vitb")


def test_pretrain_and_compare_take_a_config_by_name(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)  # where there are no configs
    with pytest.raises(SystemExit) as status:
        call(monkeypatch, "pretrain", "--config", "nepa_demo", "--print_config")
    printed = capsys.readouterr().out
    assert status.value.code == 0 and "max_epochs: 60" in printed and "weight_decay: 0.05" in printed
    with pytest.raises(SystemExit) as status:
        call(monkeypatch, "pretrain", "--config", "nepa_dmo")
    assert status.value.code == 2 and "The nearest: nepa_demo" in capsys.readouterr().err
    bad = ["--data", "digits", "--evaluate", "knn", "--", "--trainer.max_epocs", "1"]
    messages = {
        "nepa_digits": r"error: nepa_digits: config key `trainer.max_epocs`.*`trainer.max_epochs`",
        "nepa_digit": r"error: No config file at nepa_digit, .*nearest: nepa_digits",
    }
    for name, message in messages.items():
        with pytest.raises(SystemExit) as status:
            call(monkeypatch, "compare", name, *bad)
        assert status.value.code == 2 and re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_pretrain_in_two_processes(tmp_path):
    two = ["--trainer.devices", "2", "--trainer.accelerator", "cpu", "--data.batch_size_per_device", "64"]
    command = [*NEPA, "pretrain", "--config", "nepa_demo", *FAST, *two, "--run_dir", "run"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert '"devices": "2 x cpu"' in (tmp_path / "run" / "summary.json").read_text()
    assert (tmp_path / "run" / "backbone" / "model.safetensors").is_file()
