"""The rooms of the package: imports point downwards, and neither side needs the other's framework."""

import subprocess
import sys

import pytest
from imports import FLOOR, PACKAGE, PARTS, imports, modules, room


def test_every_room_has_its_floor():
    assert {room(module) for module in modules()} - {""} == set(FLOOR)
    found = {path.stem for path in PACKAGE.glob("*.py")}
    assert found == {"__init__", "predictor", "loss", *PARTS}


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
        ("nepa_plugin.methods, nepa_plugin.training.cli, nepa_plugin.comparison", ("sklearn", "pandas")),
    ],
)
def test_what_is_not_needed_is_not_imported(imported, absent):
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
