"""What mmengine 0.10 and mmsegmentation 1.2 need to run on current torch. Importing this module applies it.

``mim`` itself needs ``pkg_resources``, which newer setuptools lacks; the ``mmseg`` extra pins ``setuptools<81``. That
pin can go when openmim reads package metadata through ``importlib.metadata``.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

from nepa_plugin.checkpoints import allow_mmengine_checkpoints

_EXTENSION = "mmcv._ext"


def provide_mmcv_ops() -> bool:
    """Stand in for mmcv's compiled operators where mmcv has none (``mmcv-lite``), so that ``mmcv.ops`` imports.

    mmsegmentation imports ``mmcv.ops`` even for models that use no operator of it, such as UperNet. Every operator of
    the stand-in raises ``NotImplementedError`` when it is called. A compiled mmcv is left as it is.

    Can go when mmcv has wheels for current torch, or mmsegmentation guards its imports.

    Returns:
        Whether the stand-in is in place.
    """
    present = sys.modules.get(_EXTENSION)
    if present is not None:
        return isinstance(present, _MissingOps)
    # Looked up on mmcv's path: find_spec("mmcv._ext") would not say why an extension that is there cannot be loaded.
    mmcv = importlib.import_module("mmcv")
    if importlib.machinery.PathFinder.find_spec(_EXTENSION, mmcv.__path__) is not None:
        return False
    module = _MissingOps(_EXTENSION)
    # mmengine asks importlib for the extension, which refuses modules without a spec; a spec without a loader makes
    # mmcv's own check_ops_exist() answer truthfully that there are no operators.
    module.__spec__ = importlib.machinery.ModuleSpec(_EXTENSION, loader=None)
    sys.modules[_EXTENSION] = module
    mmcv._ext = module  # type: ignore[attr-defined]
    return True


class _MissingOps(types.ModuleType):
    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("get_compiler_version", "get_compiling_cuda_version"):
            return lambda: "not compiled"  # type: ignore[return-value]  # printed with the environment at each start

        def missing(*args: Any, **kwargs: Any) -> NoReturn:
            raise NotImplementedError(
                f"mmcv's operator {name!r} is not available: the installed mmcv has no compiled operators. Build mmcv "
                "from source against your torch (pip install --no-build-isolation mmcv), or choose a model without it."
            )

        missing.__name__ = name
        return missing


# Can go when mmengine loads its own checkpoints on torch >= 2.6, where torch.load refuses other objects than tensors.
allow_mmengine_checkpoints()
provide_mmcv_ops()
