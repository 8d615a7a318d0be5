import pytest
import torch

from nepa_plugin.evaluation import EvaluationOptions, LinearOptions, memory
from nepa_plugin.evaluation.memory import GB, Sizes, Step, check_memory, memory_steps

VIT_B = {"classes": 1000, "width": 768, "tokens": 257, "depths": 14, "pools": 2}
EVERYTHING = ["knn", "linear", "readout"]


def _steps(sizes, options=None, features=1, protocols=EVERYTHING, kept_tokens=False):
    steps = memory_steps(sizes, protocols, options or EvaluationOptions(), features, kept_tokens)
    return {step.name: step for step in steps}


def test_vit_b_on_imagenet_fits_in_32_gb():
    """On one CUDA device, whose part counts for the device, and on the CPU alone."""
    for cuda in (True, False):
        steps = _steps(Sizes(train=1_281_167, val=50_000, cuda=cuda, **VIT_B))
        assert list(steps) == [
            "paths and labels",
            "features",
            "kNN",
            "neighbours at every depth",
            "probes of every depth",
        ]
        paths = steps.pop("paths and labels").host
        assert all(paths + step.host < 32 * GB for step in steps.values())
        # one depth of 1.28 million images, which the cache maps into memory afterwards
        assert steps["features"].host - (0 if cuda else steps["kNN"].host) >= 4 * 768 * 1_281_167 * (
            0.99 if cuda else 0
        )
    on_device = _steps(Sizes(train=1_281_167, val=50_000, cuda=True, **VIT_B))
    assert max(step.device for step in on_device.values()) < 40 * GB


def test_features_of_every_depth_by_hand():
    sizes = Sizes(train=50_000, val=10_000, cuda=True, **VIT_B)
    image = 4 * 768 * 28
    options = EvaluationOptions()
    assert _steps(sizes, options, 28)["features"].host == 50_000 * image  # then they are mapped, and validation's come
    assert _steps(sizes, EvaluationOptions(floor=True), 28)["features"].host == 50_000 * image
    assert _steps(sizes, EvaluationOptions(cache=False), 28)["features"].host == 60_000 * image
    assert _steps(sizes, EvaluationOptions(cache=False, floor=True), 28)["features"].host == 120_000 * image
    two = Sizes(train=50_000, val=10_000, cuda=True, processes=2, **VIT_B)
    assert _steps(two, options, 28)["features"].host == 100_000 * image  # the shares, and all in process zero
    tokens = _steps(sizes, options, 0, ["attentive"], kept_tokens=True)["features"].host
    assert tokens == 50_000 * 4 * 768 * 257


def test_the_readout_of_many_images_grows_with_validation_only():
    def need(train, val):
        steps = _steps(Sizes(train=train, val=val, cuda=True, **VIT_B), features=0, protocols=["readout"])
        return sum(step.host + step.device for step in steps.values() if step.name != "paths and labels")

    assert need(100_000, 10_000) == need(10_000_000, 10_000)
    queries = 4 * 768 * 28
    assert need(100_000, 20_000) - need(100_000, 10_000) == pytest.approx(10_000 * 3 * queries, rel=0.4)


def test_too_little_memory_is_one_line(monkeypatch):
    monkeypatch.setattr(memory, "_free_host_memory", lambda: int(16 * GB))
    steps = [Step("paths and labels", GB, 0), Step("features", 15 * GB, 0, "Lower x."), Step("kNN", 2 * GB, 90 * GB)]
    check_memory(steps, torch.device("cpu"))
    monkeypatch.setattr(memory, "_free_host_memory", lambda: int(15.9 * GB))
    with pytest.raises(ValueError, match=r"features would need 16\.0 GB of memory, and 15\.9 GB are free\. Lower x\."):
        check_memory(steps, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(80 * GB), int(80 * GB)))
    monkeypatch.setattr(memory, "_free_host_memory", lambda: int(160 * GB))
    with pytest.raises(ValueError, match=r"kNN would need 90\.0 GB of memory on cuda:1, and 80\.0 GB are free"):
        check_memory(steps, torch.device("cuda:1"))


def test_what_a_container_has_left(monkeypatch, tmp_path):
    files = {"memory.max": "5000000000", "memory.current": "3000000000", "memory.stat": "anon 1\nfile 1000000000\n"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(memory, "CONTAINER", tmp_path)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("Memory", (), {"available": int(9e9)}))
    assert memory._free_host_memory() == 3 * GB
    (tmp_path / "memory.max").write_text("max")
    assert memory._free_host_memory() == 9 * GB


def test_solvers_need_what_they_keep():
    sizes = Sizes(train=50_000, val=10_000, **VIT_B)
    logistic, sgd = (_steps(sizes, EvaluationOptions(linear=LinearOptions(solver=s))) for s in ("logistic", "sgd"))
    assert "logistic regression" in logistic and "probes of every depth" not in logistic
    assert "logistic regression" not in sgd and "probes of every depth" in sgd
    assert "Lower --linear.logistic_limit" in logistic["logistic regression"].remedy
