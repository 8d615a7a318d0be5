import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("mmseg")
from mmengine.logging import HistoryBuffer

from nepa_plugin.segmentation import compat


def test_a_missing_operator_names_itself():
    if not compat.provide_mmcv_ops():
        pytest.skip("a compiled mmcv is installed")
    import mmcv.ops

    with pytest.raises(NotImplementedError, match=r"'nms' is not available.*Build mmcv"):
        mmcv.ops.nms(torch.rand(2, 4), torch.rand(2), 0.5)


def test_a_compiled_mmcv_is_left_alone(tmp_path):
    """In a fresh process with an mmcv that brings its extension."""
    (tmp_path / "mmcv").mkdir()
    (tmp_path / "mmcv" / "__init__.py").write_text("")
    (tmp_path / "mmcv" / "_ext.py").write_text("nms = 'compiled'\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from nepa_plugin.segmentation import compat\n"
        "import mmcv._ext; print(compat.provide_mmcv_ops(), mmcv._ext.nms)"
    )
    # the package's __init__ would import mmengine's side with the false mmcv, compat alone needs none of it
    code = "import nepa_plugin.checkpoints, types, sys, importlib.util\n" + code.replace(
        "from nepa_plugin.segmentation import compat",
        f"spec = importlib.util.spec_from_file_location('compat', {compat.__file__!r}); "
        "compat = importlib.util.module_from_spec(spec); spec.loader.exec_module(compat)",
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "compiled"]


def test_mmengine_checkpoints_load_as_tensors_only(tmp_path):
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save({"log": history, "best": np.float64(3.0), "x": torch.ones(2)}, tmp_path / "a.pth")
    loaded = torch.load(tmp_path / "a.pth", weights_only=True)
    assert loaded["log"].data[0].tolist() == [1.0, 2.0] and loaded["best"] == 3.0


def test_other_objects_are_still_refused(tmp_path):
    torch.save({"x": subprocess.Popen}, tmp_path / "a.pth")
    with pytest.raises(Exception, match="Popen"):
        torch.load(tmp_path / "a.pth")


class Getattr:
    """Pickles as getattr(owner, name)."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


@pytest.mark.parametrize(("owner", "name"), [(HistoryBuffer, "__init__"), (torch.Tensor, "mean")])
def test_getattr_is_allowed_for_the_statistics_of_a_buffer_only(tmp_path, owner, name):
    torch.save({"x": Getattr(HistoryBuffer, "mean")}, tmp_path / "good.pth")
    assert torch.load(tmp_path / "good.pth")["x"] is HistoryBuffer.mean
    torch.save({"x": Getattr(owner, name)}, tmp_path / "bad.pth")
    with pytest.raises(Exception, match=r"not part of an mmengine checkpoint|Unsupported|not allowed"):
        torch.load(tmp_path / "bad.pth")
