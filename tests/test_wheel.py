"""The wheel, made from the sdist, installed in a folder of its own and used from an empty one."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from pretraining import FAST

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
CONFIGS = ("lightly_configs", "mmseg_configs")


def pip(*args):
    quiet = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-index")
    subprocess.run([sys.executable, "-m", "pip", *map(str, args), *quiet], check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A copy is built, as setuptools leaves a build folder whose old files would go into the next wheel."""
    folder = tmp_path_factory.mktemp("build")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("nepa_plugin", "tests", *CONFIGS):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=unwanted)
    for name in ("nepa_command.py", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=folder / "source", check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder, unpacked)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def nepa(wheel, tmp_path_factory):
    """Calls the installed command, or python, in an empty folder. The environment's packages are there, too."""
    site, here = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("empty")
    pip("install", "--target", site, wheel)
    # PYTHONPATH comes before the checkout that is installed as editable
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def call(*args, python=False):
        command = [sys.executable] if python else [str(site / "bin" / "nepa")]
        result = subprocess.run([*command, *map(str, args)], cwd=here, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return SimpleNamespace(call=call, site=site, here=here)


def test_what_the_wheel_holds(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {
        path for path in (ROOT / "nepa_plugin").rglob("*") if path.suffix in (".py", ".html") or path.name == "py.typed"
    }
    configs = {path for folder in CONFIGS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml")}
    expected = {path.relative_to(ROOT).as_posix() for path in package}
    expected |= {f"nepa_plugin/{path.relative_to(ROOT).as_posix()}" for path in configs}
    assert names == expected | {"nepa_command.py"}
    assert "nepa_plugin/py.typed" in names and "nepa_plugin/lightly_configs/_base_/digits.yaml" in names


def test_the_list_of_commands_and_of_configs(nepa):
    assert nepa.call("--help").startswith("usage: nepa COMMAND ...\n")
    listed = [line.split()[0] for line in nepa.call("configs").splitlines() if line.startswith("  ")]
    shown = [*CONFIGS, *(f"lightly_configs/{name}" for name in ("finetune", "ablations", "orders"))]
    files = [path for folder in shown for path in (ROOT / folder).glob("*.*") if path.stem != "base"]
    assert sorted(listed) == sorted(path.stem for path in files)


def test_an_mmsegmentation_config_is_found_with_what_it_builds_on(nepa):
    pytest.importorskip("mmengine")
    path = nepa.call("configs", "nepa_vit_b_ade20k").strip()
    assert path == str(nepa.site / "nepa_plugin" / "mmseg_configs" / "nepa_vit_b_ade20k.py")
    code = """
import json, sys, mmengine, nepa_plugin
model = mmengine.Config.fromfile(sys.argv[1]).model  # imports nepa_plugin.segmentation
print(json.dumps([nepa_plugin.__file__, sys.modules["nepa_plugin.segmentation"].__file__, model.backbone.attention]))
"""
    *files, attention = json.loads(nepa.call("-c", code, path, python=True).splitlines()[-1])
    assert all(Path(file).is_relative_to(nepa.site) for file in files) and attention == "bidirectional"


def test_pretrain_by_name_and_evaluate(nepa):
    nepa.call("pretrain", "--config", "nepa_demo", *FAST, "--trainer.max_epochs", 1, "--trainer.accelerator", "cpu")
    run = nepa.here / "runs" / "nepa_demo"
    # base.yaml was read, too: the seed is set there
    assert "seed_everything: 1337\n" in (run / "config.yaml").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["commit"] is None  # no file of the checkout was used
    nepa.call("evaluate", run / "backbone", "--data", "digits", "--protocol", "knn", "--out", run)
    assert 15 < json.loads((run / "results.json").read_text())["protocols"]["knn"]["top1"] <= 100
