import json
import subprocess
from pathlib import Path

import torch

from nepa_plugin.runtime.provenance import provenance

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
