"""The rooms of the package, the floors they are on, and who imports whom, read from the code without running it."""

import ast
from collections import Counter
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "nepa_plugin"
#: From the bottom to the top. A room imports rooms of the floors below it, not its neighbours.
FLOORS = (
    {"predictor", "loss"},
    {"models", "runtime"},
    {"checkpoints"},
    {"data"},
    {"analysis"},
    {"methods", "segmentation"},
    {"finetuning"},
    {"training", "evaluation"},
    {"comparison", "speed"},
    {"commands"},
)
#: Files on the ground floor that are a part of another's room.
PARTS = {"rope": "predictor", "order": "predictor", "features": "predictor"}
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
    """The room of a module; the package itself, which is the public API, has none."""
    name = [*module.split("."), ""][1]
    return PARTS.get(name, name)


def arrows():
    """How many pairs of modules import across two rooms, per (room above, room below)."""
    pairs = ((room(module), room(other)) for module in modules() for other in imports(module))
    return Counter((above, below) for above, below in pairs if above and above != below)
