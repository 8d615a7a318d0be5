import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

os.environ.setdefault("MPLBACKEND", "Agg")
DATA = Path(__file__).parent / "data"
TOY, TOY_CLASSIFIER = DATA / "nepa-toy-gelu", DATA / "nepa-toy-gelu-classifier"


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    os.environ["NEPA_PLUGIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def expected():
    return load_file(TOY / "expected.safetensors")


@pytest.fixture
def toy():
    import nepa_plugin

    return nepa_plugin.load_backbone(TOY)


@pytest.fixture
def small():
    """An untrained predictor of 16x16 images with 4x4 patches: T = 17, D = 32."""
    from nepa_plugin import NepaViT

    torch.manual_seed(0)
    return NepaViT(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)
