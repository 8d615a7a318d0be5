"""Guards around mmengine's training, in real runs of a few steps."""

import pytest
import torch

pytest.importorskip("mmseg")
from holding import held
from mmengine.runner import Runner
from tiny import losses, tiny_config

import nepa_plugin
from nepa_plugin.checkpoints import BACKBONE_CONFIG_KEY, CheckpointError, read_tensors
from nepa_plugin.segmentation import ConfigError


def test_a_run_writes_checkpoints_logs_and_the_best(run):
    assert list(losses(run)) == [1, 2, 3, 4]
    assert (run / "iter_4.pth").is_file() and list(run.glob("best_mIoU_iter_*.pth"))
    assert list(run.glob("*/vis_data/events.out.tfevents*"))
    text = (run / "training.log").read_text()
    assert "Global batch 16 = 16 per device x 1 device(s) x 1 accumulated" in text
    assert text.count("Parameter groups, layer decay 0.") == 1


def test_the_backbone_of_a_checkpoint_loads(run, tmp_path):
    weights = read_tensors(run / "iter_4.pth")["state_dict"]
    model = nepa_plugin.load_backbone(run / "iter_4.pth")
    own = model.state_dict()
    assert own and all(torch.equal(own[key], weights["backbone.vit." + key]) for key in own)
    assert not model.is_causal
    folder = nepa_plugin.save_backbone(model, tmp_path / "backbone")
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(nepa_plugin.load_backbone(folder)(images), model(images))


def test_a_backbone_from_a_segmentation_run(run, scenes, tmp_path):
    runner = Runner.from_cfg(tiny_config(scenes, run / "iter_4.pth", tmp_path / "w"))
    runner.model.init_weights()
    weights = read_tensors(run / "iter_4.pth")["state_dict"]
    state = runner.model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in weights.items() if k.startswith("backbone."))


def test_another_run_is_not_overwritten(run, scenes, backbone_folder):
    before = {p: p.read_bytes() for p in run.glob("*.pth")}
    with pytest.raises(FileExistsError, match=r"Add --resume to go on with it, or choose another --work-dir"):
        Runner.from_cfg(tiny_config(scenes, backbone_folder, run)).train()
    assert {p: p.read_bytes() for p in run.glob("*.pth")} == before


def test_one_run_at_a_time(scenes, backbone_folder, tmp_path):
    runner = Runner.from_cfg(tiny_config(scenes, backbone_folder, tmp_path / "run"))
    with held(tmp_path / "run") as pid, pytest.raises(ConfigError, match=f"in use by process {pid} .* --work-dir"):
        runner.train()


def test_resume_goes_on_where_it_stopped(run, scenes, backbone_folder, tmp_path):
    """Two steps, then two more after --resume: steps, schedule and optimizer are those of the run of four."""
    options = {"default_hooks__checkpoint__save_best": None}
    first = tiny_config(scenes, backbone_folder, tmp_path / "r", **options)
    first.train_cfg.max_iters = 2
    first.param_scheduler[-1].end = 4
    Runner.from_cfg(first).train()
    second = tiny_config(scenes, backbone_folder, tmp_path / "r", resume=True, **options)
    Runner.from_cfg(second).train()
    assert list(losses(tmp_path / "r")) == [1, 2, 3, 4]
    states = [read_tensors(folder / "iter_4.pth") for folder in (run, tmp_path / "r")]
    assert states[0]["meta"]["iter"] == states[1]["meta"]["iter"] == 4
    rates = [[g["lr"] for g in s["optimizer"]["param_groups"]] for s in states]
    assert rates[0] == pytest.approx(rates[1])
    assert {int(state["step"]) for state in states[1]["optimizer"]["state"].values()} == {4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("decode_head.conv_seg.bias"), r"missing: decode_head\.conv_seg\.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), r"unexpected: extra"),
        (
            lambda state: state.update({"backbone.vit.norm.weight": torch.zeros(3)}),
            r"backbone\.vit\.norm\.weight is \(3,\), the model has \(32,\)",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_an_error(run, scenes, tmp_path, change, message):
    checkpoint = read_tensors(run / "iter_4.pth")
    change(checkpoint["state_dict"])
    torch.save(checkpoint, tmp_path / "damaged.pth")
    with pytest.raises(CheckpointError, match=message):
        Runner.from_cfg(tiny_config(scenes, None, tmp_path / "w", load_from=str(tmp_path / "damaged.pth"))).test()


def test_a_checkpoint_that_was_trained_in_another_order_is_not_tested_in_this_one(run, scenes, tmp_path):
    checkpoint = read_tensors(run / "iter_4.pth")
    checkpoint[BACKBONE_CONFIG_KEY]["model_args"]["order"] = "hilbert"
    torch.save(checkpoint, tmp_path / "hilbert.pth")
    with pytest.raises(CheckpointError, match=r"hilbert\.pth .*: order is hilbert, the config has raster"):
        Runner.from_cfg(tiny_config(scenes, None, tmp_path / "w", load_from=str(tmp_path / "hilbert.pth"))).test()


def test_a_checkpoint_of_something_else(scenes, tmp_path):
    torch.save({"weights": {}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"model\.backbone\.init_cfg\.checkpoint"):
        Runner.from_cfg(tiny_config(scenes, None, tmp_path / "w", load_from=str(tmp_path / "other.pth"))).test()


@pytest.mark.parametrize("head", ["decode_head", "auxiliary_head"])
def test_a_wrong_number_of_classes(scenes, backbone_folder, tmp_path, head):
    cfg = tiny_config(scenes, backbone_folder, tmp_path / "w", **{f"model__{head}__num_classes": 12})
    with pytest.raises(ValueError, match=rf"model\.{head}\.num_classes is 12, but DigitScenes has 11 classes"):
        Runner.from_cfg(cfg).train()
    assert not list((tmp_path / "w").glob("*.pth"))


def test_another_batch_size_is_pointed_out(scenes, backbone_folder, tmp_path):
    cfg = tiny_config(scenes, backbone_folder, tmp_path / "w", iterations=2, train_dataloader__batch_size=4)
    cfg.param_scheduler = []
    Runner.from_cfg(cfg).train()
    (log,) = (tmp_path / "w").glob("*/*.log")
    assert "The schedule is for 16 images per step, this run has 4." in log.read_text()


def test_multi_scale_testing_checks_the_checkpoint_too(run, scenes, tmp_path):
    cfg = tiny_config(scenes, None, tmp_path / "w", load_from=str(run / "iter_4.pth"))
    cfg.tta_model.module = cfg.model
    cfg.model = cfg.tta_model
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.test_dataloader.batch_size = 1
    metrics = Runner.from_cfg(cfg).test()
    assert 0 <= metrics["mIoU"] <= 100
    checkpoint = read_tensors(run / "iter_4.pth")
    checkpoint["state_dict"].pop("backbone.vit.cls_token")
    torch.save(checkpoint, tmp_path / "damaged.pth")
    cfg.load_from, cfg.experiment_name = str(tmp_path / "damaged.pth"), "damaged"
    with pytest.raises(CheckpointError, match=r"missing: backbone\.vit\.cls_token"):
        Runner.from_cfg(cfg).test()
