"""Modules under the names they had in version 0.1, which saved configs and users' scripts may hold."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

_ROOMS = {
    "comparison": ("report",),
    "data": ("digits", "files", "packing", "pipelines", "resample", "samples", "shards", "transforms"),
    "runtime": ("averaging", "devices", "provenance", "sharding"),
    "speed": ("communication",),
    "training": ("callbacks", "cli", "configs", "curves", "stopping"),
}
#: Old name -> new name.
MOVED = {f"nepa_plugin.{name}": f"nepa_plugin.{room}.{name}" for room, names in _ROOMS.items() for name in names}
MOVED["nepa_plugin.vit"] = "nepa_plugin.models.names"
MOVED["nepa_plugin.evaluation.runtime"] = "nepa_plugin.evaluation.processes"


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module under its old name: the same module object, with a ``DeprecationWarning``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return a spec for the old names only."""
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Import the module under its new name."""
        new = MOVED[spec.name]
        warnings.warn(f"{spec.name} is now {new}.", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Run nothing again; the import system has given the module the old name's spec, which is taken back."""
        module.__spec__ = self._spec


sys.meta_path.append(MovedModules())
