import subprocess
import sys

import pytest

pytest.importorskip("mmseg")


def script(tmp_path, body):
    (tmp_path / "script.py").write_text("import nepa_plugin.segmentation as s\n" + body)
    done = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True)
    assert done.returncode == 1
    return [line for line in done.stderr.splitlines() if not line.strip().startswith(("warn", "/"))]


def test_bad_input_is_one_line(tmp_path):
    (line,) = script(tmp_path, "s.TimmViT('nepa_vit_bas_patch14_224')")
    assert line.startswith("error: arch='nepa_vit_bas_patch14_224' is not a timm model. Did you mean nepa_vit_base_pat")


def test_a_wrong_config_key_is_one_line(tmp_path):
    code = (
        "from mmengine.registry import MODELS\nMODELS.build(dict(type='TimmViT', arch='vit_tiny_patch16_224', dpeth=3))"
    )
    (line,) = script(tmp_path, code)
    assert line.startswith("error: ") and "unexpected keyword argument 'dpeth'" in line
    (line,) = script(tmp_path, "from mmengine.registry import MODELS\nMODELS.build(dict(type='TimViT'))")
    assert line.startswith("error: TimViT is not in the ")


def test_a_failure_keeps_its_traceback(tmp_path):
    lines = script(tmp_path, "raise ValueError('a bug')")
    assert lines[0].startswith("Traceback") and lines[-1] == "ValueError: a bug"
    lines = script(
        tmp_path, "import torch\ns.TimmViT('vit_tiny_patch16_224', model_args=dict(depth=1))(torch.zeros(3))"
    )
    assert lines[0].startswith("Traceback")
