"""Results of other images are not mixed, and what is kept of features is used only where it is theirs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from nepa_plugin.comparison.plan import Comparison, Run
from nepa_plugin.comparison.run import _evaluate
from nepa_plugin.evaluation import EvaluationOptions, evaluate, read_results
from nepa_plugin.evaluation.cache import FeatureCache

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
OPTIONS = EvaluationOptions(k=2, accelerator="cpu", num_workers=0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEPA_PLUGIN_CACHE", str(tmp_path / "cache"))


def images(root, seed=0):
    """Six training and four validation images of two classes, in files that are all equally long."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", 3), ("val", 2)):
        for label in "ab":
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
                    root / split / label / f"{i}.bmp"
                )
    return root


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("nepa_vit_tiny_patch14_224", **SIZES).eval()


def test_results_of_other_images_of_the_same_names_and_sizes_are_refused(model, tmp_path):
    first = evaluate(model, images(tmp_path / "one"), ["knn"], OPTIONS, tmp_path / "out")
    whole = (tmp_path / "out" / "results.json").read_text()
    with pytest.raises(ValueError, match=r"results\.json holds results on other images \(.*/one, 6 for training, 2"):
        evaluate(model, images(tmp_path / "two", seed=1), ["linear"], OPTIONS, tmp_path / "out")
    assert (tmp_path / "out" / "results.json").read_text() == whole
    shutil.copytree(tmp_path / "one", tmp_path / "copy", copy_function=shutil.copyfile)  # with other times
    again = evaluate(model, tmp_path / "copy", ["linear"], OPTIONS, tmp_path / "out")
    assert again["data"]["images_sha256"] == first["data"]["images_sha256"]
    assert list(read_results(tmp_path / "out")["protocols"]) == ["knn", "linear"]


def test_results_without_a_fingerprint_stay_readable(model, tmp_path):
    evaluate(model, images(tmp_path / "one"), ["knn"], OPTIONS, tmp_path / "out")
    old = json.loads((tmp_path / "out" / "results.json").read_text())
    del old["data"]["images_sha256"]
    (tmp_path / "out" / "results.json").write_text(json.dumps(old))
    evaluate(model, tmp_path / "one", ["linear"], OPTIONS, tmp_path / "out")
    now = read_results(tmp_path / "out")
    assert list(now["protocols"]) == ["knn", "linear"] and len(now["data"]["images_sha256"]["train"]) == 64


def test_a_comparison_evaluates_again_when_its_images_changed(model, tmp_path):
    import nepa_plugin

    nepa_plugin.save_backbone(model, tmp_path / "run" / "backbone")
    data, lines = images(tmp_path / "one"), []
    what = Comparison([], tmp_path, str(data), ["knn"], [0], options=OPTIONS)

    def evaluated(run):
        lines.clear()
        _evaluate(run, what, "", lines.append)
        return run.error or "evaluating knn" in lines

    assert evaluated(Run("r", 0, tmp_path / "run")) is True
    assert evaluated(Run("r", 0, tmp_path / "run")) is False
    shutil.rmtree(data)
    images(data, seed=1)
    assert evaluated(Run("r", 0, tmp_path / "run")) is True


# -- kept features -----------------------------------------------------------------------------------------------------


def damaged(values):
    """Everything that can be wrong with a kept tensor, by name."""
    yield "shorter", values[:-1].clone()
    yield "longer", torch.cat([values, values[:1]])
    yield "empty", values[:0].clone()
    yield "another shape", values.unsqueeze(-1).clone()
    yield "another type", values.double() if values.is_floating_point() else values.float()
    if values.ndim == 2:
        yield "narrower", values[:, :-1].clone()
        yield "not finite", values.index_fill(1, torch.tensor([3]), float("nan"))
    else:
        yield "other labels", 1 - values


def test_what_does_not_fit_is_computed_again(model, tmp_path):
    data = images(tmp_path / "one")
    expected = evaluate(model, data, ["knn"], OPTIONS)["protocols"]["knn"]["top1"]
    files = sorted((tmp_path / "cache" / "features").rglob("*.safetensors"))
    assert [file.name for file in files] == ["final_norm-mean.safetensors", "labels.safetensors"] * 2
    for file in files:
        whole = load_file(file)["values"]
        for what, values in damaged(whole):
            save_file({"values": values}, file)
            assert evaluate(model, data, ["knn"], OPTIONS)["protocols"]["knn"]["top1"] == expected, what
            assert torch.equal(load_file(file)["values"], whole), what
        save_file({"other": whole}, file)
        assert evaluate(model, data, ["knn"], OPTIONS)["protocols"]["knn"]["top1"] == expected
        assert torch.equal(load_file(file)["values"], whole)


def test_tokens_are_checked_too(tmp_path):
    labels = torch.tensor([0, 1, 1])
    cache = FeatureCache(["key"], labels, 4)
    cache.write({"final norm/tokens": torch.ones(3, 5, 4), "labels": labels})
    assert set(cache.read(["final norm/tokens", "labels"])) == {"final norm/tokens", "labels"}
    cache.write({"final norm/tokens": torch.ones(3, 4)})
    assert set(cache.read(["final norm/tokens", "labels"])) == {"labels"}
    assert cache.folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's account of memory")
def test_what_is_kept_is_mapped_and_not_loaded(tmp_path):
    def anonymous():
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

    cache = FeatureCache(["key"], torch.zeros(60_000, dtype=torch.long), 768)
    cache.write({"final norm/mean": torch.ones(60_000, 768)})  # 184 MB
    before = anonymous()
    values = cache.read(["final norm/mean"])["final norm/mean"]
    assert float(values.sum()) == 60_000 * 768
    assert anonymous() - before < 60e6


def test_a_full_disk_loses_no_score(model, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nepa_plugin.evaluation.cache.save_file", full)
    with pytest.warns(UserWarning, match="The features are not kept in .*No space left on device"):
        result = evaluate(model, images(tmp_path / "one"), ["knn"], OPTIONS)
    assert 0 <= result["protocols"]["knn"]["top1"] <= 100
