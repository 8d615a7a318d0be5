import json
import subprocess
from pathlib import Path

import pytest
import torch

from nepa_plugin.runtime.provenance import provenance, write_json

ROOT = Path(__file__).parents[2]


def test_names_versions_commit_and_hardware():
    facts = provenance()
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert all(facts["versions"].values())
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert facts["commit"] == head.stdout.strip()
        assert facts["uncommitted_changes"] in (True, False)
    assert facts["hardware"]["cores"] >= 1 and facts["hardware"]["cpu"]
    assert json.loads(json.dumps(facts)) == facts


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "new" / "a.json", {"x": object()})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"x": 1}
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.json"]
