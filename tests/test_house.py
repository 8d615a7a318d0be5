"""The rooms of the package: imports point downwards, and neither side needs the other's framework."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nepa_plugin"
#: From the bottom to the top. A room imports rooms of the floors below it, not its neighbours.
FLOORS = (
    {"predictor", "loss"},
    {"models"},
    {"checkpoints", "runtime"},
    {"data"},
    {"analysis"},
    {"methods", "segmentation"},
    {"training", "evaluation"},
    {"comparison", "speed"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


@cache
def modules():
    """Every module's name and file."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module):
    """The modules of this package that a module imports, wherever the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in modules() else node.module)
    return {name for name in found if name in modules() and name != module}


def room(module):
    return [*module.split("."), ""][1]


def test_every_room_has_its_floor():
    assert {room(module) for module in modules()} - {""} == set(FLOOR)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "predictor.py", "loss.py"}


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_downwards(module):
    here = room(module)
    for other in imports(module):
        there = room(other)
        if here and there != here:
            assert FLOOR[there] < FLOOR[here], f"{module} imports {other}"


def test_no_circles():
    done, open_ = set(), []

    def visit(module):
        assert module not in open_, " -> ".join([*open_[open_.index(module) :], module])
        if module in done:
            return
        open_.append(module)
        for other in sorted(imports(module)):
            visit(other)
        done.add(open_.pop())

    for module in modules():
        visit(module)


@pytest.mark.parametrize(
    ("imported", "absent"),
    [
        ("nepa_plugin", ("lightly", "pytorch_lightning", "mmengine", "mmcv", "mmseg")),
        ("nepa_plugin.segmentation, nepa_plugin.segmentation.scenes", ("lightly", "pytorch_lightning")),
        ("nepa_plugin.methods, nepa_plugin.training.cli, nepa_plugin.evaluation", ("mmengine", "mmcv", "mmseg")),
    ],
)
def test_neither_side_needs_the_others_framework(imported, absent):
    code = f"import sys, {imported}; print(*(set({absent!r}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_old_names_of_modules_go_on_working():
    code = """
import warnings
warnings.simplefilter("error", DeprecationWarning)
import nepa_plugin.runtime.moved as moved
import importlib
for old, new in moved.MOVED.items():
    try:
        importlib.import_module(old)
    except DeprecationWarning as warning:
        assert str(warning) == f"{old} is now {new}.", warning
    warnings.simplefilter("ignore", DeprecationWarning)
    module = importlib.import_module(old)
    assert module is importlib.import_module(new) and module.__name__ == new == module.__spec__.name, old
    warnings.simplefilter("error", DeprecationWarning)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
