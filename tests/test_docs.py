"""The documentation: what it links to and names exists, picture and examples are those of the code, the site builds."""

import ast
import contextlib
import importlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from imports import PACKAGE, arrows
from PIL import Image

ROOT = PACKAGE.parent
sys.path.insert(0, str(ROOT / "docs"))
import architecture  # noqa: E402

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/speed.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks/digits/report.md",
]
FOLDERS = "tools|tests|benchmarks|lightly_configs|mmseg_configs|nepa_plugin|docs"
#: Options in the pages that are other programs': pip, torchrun, srun, mim, timm, http.server and the like.
FOREIGN = {
    "cfg-options",
    "checkpoint",
    "cpus-per-task",
    "dataset",
    "gpus",
    "gpus-per-node",
    "launcher",
    "logdir",
    "max-restarts",
    "no-deps",
    "nnodes",
    "nodes",
    "nproc_per_node",
    "ntasks-per-node",
    "oneline",
    "open-mode",
    "rdzv_backend",
    "rdzv_endpoint",
    "rdzv_id",
    "requeue",
    "resume",
    "signal",
    "standalone",
    "time",
    "wheel-dir",
}
#: Options of the scripts in benchmarks/, which parse them in their main.
SCRIPTS = [path.read_text() for path in sorted((ROOT / "benchmarks").glob("*.py"))]


def name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_between_files(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
    dead = [link for link in links if not (page.parent / link).exists()]
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named(page):
    named = re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w/.-]+\.(?:py|yaml|yml|json|csv|md|sh)\b", page.read_text())
    gone = [path for path in named if "NAME" not in path and not (ROOT / path).is_file()]
    assert gone == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_that_are_named(page):
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", page.read_text(), re.DOTALL))
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", code))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named <= targets


@pytest.fixture(scope="module")
def options():
    """Every option of every command, read from its ``--help``, and the methods' own."""
    from nepa_command import COMMANDS
    from nepa_plugin.methods import Method  # noqa: F401, its subclasses are looked for
    from nepa_plugin.training.parser import PretrainParser

    found = {key.replace(".init_args", "") for key in PretrainParser(add_help=False)._known_keys()}
    for module, _ in COMMANDS.values():
        if module == "segment":
            pytest.importorskip("mmseg")
        with contextlib.redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit):
            importlib.import_module(f"nepa_plugin.commands.{module}").main(["--help"])
        found |= set(re.findall(r"--([a-zA-Z][\w.-]*)", text.getvalue()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_that_are_named(page, options):
    text = re.sub(r"^#SBATCH.*$", "", page.read_text(), flags=re.MULTILINE)
    named = {
        option.rstrip(".").replace(".init_args", "") for option in re.findall(r"(?<![\w-])--([a-zA-Z][\w.-]*)", text)
    }
    unknown = {
        option
        for option in named - FOREIGN
        if re.sub(r"(_args)\..*", r"\1", option) not in options  # a dictionary's keys are another class's arguments
        and not any(f'"--{option}"' in script for script in SCRIPTS)
    }
    assert unknown == set()


def test_the_readme_lists_every_command():
    from nepa_command import COMMANDS

    text = (ROOT / "README.md").read_text()
    listed = re.search(
        r"is also a sub-command of `nepa`, with the\s+same options: (.*?)\. `nepa --help`", text, re.DOTALL
    )
    scripts = {path.stem for path in (ROOT / "tools").glob("*.py")}
    commands = {name for name, (module, _) in COMMANDS.items() if module in scripts}
    assert set(re.findall(r"`([a-z-]+)`", listed[1])) == commands and len(commands) == len(scripts)


def test_the_picture_and_the_table_of_rooms_are_those_of_the_code():
    with Image.open(architecture.PICTURE) as picture:
        drawn = json.loads(picture.info["Description"])
    assert [tuple(pair) for pair in drawn] == sorted(arrows()), "run python docs/architecture.py"
    page = architecture.PAGE.read_text()
    written = page.partition(architecture.START)[2].partition(architecture.END)[0].strip()
    assert written == architecture.table(), "run python docs/architecture.py"


def test_every_function_on_the_way_of_a_batch_exists():
    found = re.findall(r"\| `([\w/]+\.py): ([\w.]+)` \|", architecture.PAGE.read_text())
    assert len(found) > 20
    for file, path in found:
        body = ast.parse((PACKAGE / file).read_text()).body
        for part in path.split("."):
            inside = [node for node in body if getattr(node, "name", None) == part]
            assert inside, f"{file} has no {path}"
            body = inside[0].body


def example(language, start):
    """Return the code block of the page on architecture that begins so."""
    blocks = re.findall(rf"```{language}\n(.*?)```", architecture.PAGE.read_text(), re.DOTALL)
    (block,) = [block for block in blocks if block.startswith(start)]
    return block


def test_the_example_of_a_method_trains(tmp_path, monkeypatch):
    from nepa_plugin.training.cli import base_config, main

    code = example("python", "from collections.abc import Callable")
    assert len(code.splitlines()) < 60
    (tmp_path / "rotation.py").write_text(code)
    (tmp_path / "rotation_digits.yaml").write_text(example("yaml", "model:"))
    monkeypatch.syspath_prepend(str(tmp_path))
    run = tmp_path / "run"
    steps = ["--trainer.max_steps", "2", "--trainer.enable_model_summary", "false", "--model.turns", "3"]
    main(["--config", str(tmp_path / "rotation_digits.yaml"), "--run_dir", str(run), *steps], base_config())
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["method"], summary["steps"]) == ("Rotation", 2)
    assert (run / "backbone" / "model.safetensors").is_file()
    method = importlib.import_module("rotation").Rotation.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
    assert method.head.out_features == 3
    sys.modules.pop("rotation")


def test_the_example_of_a_segmentation_dataset_is_read(tmp_path):
    config = pytest.importorskip("mmengine.config")
    pytest.importorskip("mmseg")
    from mmengine.registry import DefaultScope
    from mmseg.registry import DATASETS

    import nepa_plugin.segmentation  # noqa: F401

    code = example("python", "_base_ = ").replace("mmseg_configs", str(ROOT / "mmseg_configs"))
    (tmp_path / "mine.py").write_text(code.replace("data/mine", str(tmp_path)))
    for part in ("images", "annotations"):
        (tmp_path / part / "training").mkdir(parents=True)
    Image.new("RGB", (32, 16)).save(tmp_path / "images/training/a.jpg")
    Image.new("L", (32, 16), 1).save(tmp_path / "annotations/training/a.png")
    read = config.Config.fromfile(tmp_path / "mine.py")
    with DefaultScope.overwrite_default_scope("mmseg"):
        dataset = DATASETS.build(read.train_dataloader.dataset)
    assert type(dataset).__name__ == "SegmentationFolder"
    assert dataset.metainfo["classes"] == ("sky", "road")
    assert [Path(item["img_path"]).name for item in dataset.load_data_list()] == ["a.jpg"]
    assert read.model.decode_head.num_classes == read.model.auxiliary_head.num_classes == 2


def test_the_versions_are_those_that_are_asked_for():
    (torch,) = re.findall(r'"torch>=([\d.]+),<=(\d+\.\d+)', (ROOT / "pyproject.toml").read_text())
    (python,) = re.findall(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    said = f"Python 3.{python[0]} to 3.{int(python[1]) - 1} and PyTorch {torch[0]} to {torch[1]}"
    assert said in " ".join((ROOT / "README.md").read_text().split())


@pytest.mark.slow
def test_the_site_builds_strictly_and_fetches_nothing(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings", "griffe"):
        pytest.importorskip(module, reason="the docs extra is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    for page in ("index", "architecture", "private_parts", "CONTRIBUTING", "CHANGELOG", "benchmarks/digits/report"):
        assert (tmp_path / "site" / f"{page}.html").is_file()
    assert 'id="nepa_plugin.methods.NEPA"' in (tmp_path / "site/api/methods.html").read_text()
    for page in (tmp_path / "site").rglob("*.html"):
        if page.name != "report.html":
            fetched = re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="(https?:[^"]+)', page.read_text())
            fetched += re.findall(r'<link[^>]*rel="stylesheet"[^>]*href="(https?:[^"]+)', page.read_text())
            assert fetched == [], page
