import contextlib
import importlib
import itertools
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

os.environ.setdefault("MPLBACKEND", "Agg")
DATA = Path(__file__).parent / "data"
#: Files that take a minute and more.
_LONGEST = ["test_scaling", "test_all_processes", "test_all"]
#: What Lightning leaves in a process that trained with a strategy of several: its next command would wait for others.
_OF_A_LAUNCH = ["LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR"]
TOY, TOY_CLASSIFIER = DATA / "nepa-toy-gelu", DATA / "nepa-toy-gelu-classifier"


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        # Two processes that import these first are in each other's way: yapf reads the other's half of a cache, and mim
        # ends where the other made ~/.cache/mim in between.
        for name in ["yapf", "mim"]:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    # A job in a script's background ignores it, and so would the commands that tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests of a file share fixtures and run in one process; those of ``test_all.py`` share them by method."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            return f"{file}[{test.partition('[')[2]}" if Path(file).name == "test_all.py" else file

    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The longest first, so that no process is left alone with them at the end."""
    items.sort(key=lambda item: _LONGEST.index(item.path.stem) if item.path.stem in _LONGEST else len(_LONGEST))


def _ports():
    """Free ports below those that the system hands out, others for every process that runs tests.

    A program that looks for a free port, as Lightning does, closes it before its processes listen there; tests beside
    it, whose connections take a port each, are quick to take that one.
    """
    first = 20_000 + 1_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for port in itertools.cycle(range(first, first + 1_000)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        yield str(port)


_PORTS = _ports()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    os.environ["MASTER_PORT"] = next(_PORTS)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    before = {name: os.environ.get(name) for name in _OF_A_LAUNCH}
    result = yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    return result


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    os.environ["NEPA_PLUGIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(autouse=True)
def lines_of_configs_as_they_are(request, monkeypatch):
    """A config's lines are broken where they read best, for a third of a second and several times in a segmentation."""
    if request.path.parent.name == "segmentation" and request.path.stem != "test_mmseg_configs":
        with contextlib.suppress(ImportError):
            import mmengine.config.config as config

            monkeypatch.setattr(config, "FormatCode", lambda text, **_: (text, True))


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


@pytest.fixture(scope="session")
def three_digits(tmp_path_factory):
    """61 training and 29 validation images of three classes: two processes do not share either evenly."""
    from nepa_plugin.data import digits_folder

    root = tmp_path_factory.mktemp("three")
    for split, counts in (("train", (20, 20, 21)), ("val", (10, 10, 9))):
        for label, count in zip("012", counts, strict=True):
            (root / split / label).mkdir(parents=True)
            for file in sorted((digits_folder() / split / label).iterdir())[:count]:
                shutil.copy(file, root / split / label)
    return root


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Small scenes of digits; tests must not change them."""
    from nepa_plugin.segmentation.scenes import digit_scenes

    return digit_scenes(tmp_path_factory.mktemp("data") / "scenes", num_training=24, num_validation=7)


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory):
    """A backbone of the size that the segmentation tests train."""
    import timm

    import nepa_plugin

    torch.manual_seed(1)
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
    model = timm.create_model("nepa_vit_tiny_patch14_224", **sizes)
    return nepa_plugin.save_backbone(model, tmp_path_factory.mktemp("pretrained") / "backbone")


@pytest.fixture(scope="session")
def run(scenes, backbone_folder, tmp_path_factory):
    """A finished segmentation run of four steps."""
    from mmengine.runner import Runner
    from tiny import tiny_config

    work_dir = tmp_path_factory.mktemp("run")
    cfg = tiny_config(scenes, backbone_folder, work_dir)
    cfg.dump(work_dir / "config.py")
    Runner.from_cfg(cfg).train()
    # mmengine's current logger goes on writing there in later tests of this process; this is the log of the run alone
    (log,) = work_dir.glob("*/*.log")
    (work_dir / "training.log").write_text(log.read_text())
    return work_dir
