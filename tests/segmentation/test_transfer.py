"""Segmentation as a comparison of backbones: the head is light, frozen is frozen, and the rows get both scores."""

import json
from pathlib import Path

import pytest
import timm
import torch

pytest.importorskip("mmseg")
from tiny import CONFIGS

import nepa_plugin
from nepa_plugin.comparison import ComparisonError, Run
from nepa_plugin.comparison.report import accuracy_table
from nepa_plugin.comparison.run import Processes
from nepa_plugin.comparison.segment import MODES, check_segmentation, segment
from nepa_plugin.segmentation.transfer import CHANNELS, four_depths, transfer_config

SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}


def config_file(folder, scenes, **train):
    lines = [f"_base_ = {str(CONFIGS / 'nepa_tiny_digits_seg.py')!r}"]
    lines += [f"{part}_dataloader = dict(dataset=dict(data_root={str(scenes)!r}))" for part in ("train", "val", "test")]
    lines += ["train_cfg = dict(max_iters=4, val_interval=2)", "default_hooks = dict(checkpoint=dict(interval=2))"]
    lines += ["param_scheduler = [dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=0)]"]
    (folder / "scenes_seg.py").write_text("\n".join(lines) + "\n")
    return folder / "scenes_seg.py"


def backbone(folder, name):
    torch.manual_seed(0)
    model = timm.create_model(name, **SIZES)
    return nepa_plugin.save_backbone(model, folder / "backbone")


def test_four_depths_end_with_the_last():
    assert four_depths(12) == [2, 5, 8, 11] and four_depths(24) == [5, 11, 17, 23]
    assert four_depths(4) == [0, 1, 2, 3] and four_depths(2) == [0, 1] and four_depths(1) == [0]


def test_the_config_has_another_backbone_and_a_light_head(scenes, tmp_path):
    source = backbone(tmp_path, "plain_vit_tiny_patch14_224")
    cfg = transfer_config(config_file(tmp_path, scenes), source, True, tmp_path / "work", seed=7)
    own = cfg.model.backbone
    assert (own.arch, own.frozen_stages, own.init_cfg.checkpoint) == ("plain_vit_tiny_patch14_224", 4, str(source))
    assert own.model_args == {"in_chans": 3, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
    assert cfg.model.neck is None and cfg.model.auxiliary_head is None and cfg.randomness.seed == 7
    head = cfg.model.decode_head
    assert (head.type, head.channels, head.kernel_size, head.num_classes) == ("FCNHead", CHANNELS, 1, 11)
    assert head.in_channels == [32] * 4 and cfg.model.data_preprocessor.mean == [127.5] * 3
    assert transfer_config(config_file(tmp_path, scenes), source, False, tmp_path).model.backbone.frozen_stages == -1


@pytest.mark.slow
def test_a_row_is_segmented_frozen_and_fine_tuned_once(scenes, tmp_path):
    source = backbone(tmp_path, "plain_vit_tiny_patch14_224")
    config = config_file(tmp_path, scenes)
    run, lines = Run("a", 3, tmp_path), []
    run.results |= segment(run, config, Processes().run, lines.append)
    assert set(run.results) == set(MODES) and lines == ["segmenting, frozen", "segmenting, fine-tuned"]
    before = nepa_plugin.load_backbone(source).state_dict()
    for mode, column in (("frozen", "segmentation_frozen"), ("tuned", "segmentation")):
        folder = tmp_path / "segmentation" / f"scenes_seg-{mode}"
        result = json.loads((folder / "result.json").read_text())
        assert run.results[column] == result and 0 <= result["mIoU"] <= 100
        assert (result["seed"], result["frozen"]) == (3, mode == "frozen")
        logged = [json.loads(line) for line in next(folder.glob("*/vis_data/scalars.json")).open()]
        assert result["mIoU"] == pytest.approx([row["mIoU"] for row in logged if "mIoU" in row][-1])
        state = torch.load(folder / "iter_4.pth", weights_only=False)["state_dict"]
        moved = [k for k, v in before.items() if not torch.equal(state[f"backbone.vit.{k}"], v)]
        assert bool(moved) == (mode == "tuned"), moved
        assert any(key.startswith("decode_head.") for key in state)
        assert not any(key.startswith(("neck.", "auxiliary_head.")) for key in state)
    table = accuracy_table([run])
    assert table.header[2:] == ["mIoU", "mIoU, frozen"]
    assert table.rows[0][2:] == [f"{run.results[c]['mIoU']:.1f}" for c in ("segmentation", "segmentation_frozen")]
    assert segment(run, config, lambda *args, **kwargs: pytest.fail("done already"), lines.append) == run.results
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ComparisonError, match=r"is of another scenes_seg.py than it is now: remove that folder"):
        segment(run, config, lambda *args, **kwargs: 0, lines.append)


def test_what_cannot_be_segmented_is_refused_at_once(scenes, tmp_path):
    assert check_segmentation(str(config_file(tmp_path, scenes))) == tmp_path / "scenes_seg.py"
    with pytest.raises(ComparisonError, match=r"--segment: No config file at nepa_vit_b_camvit.* The nearest: nepa"):
        check_segmentation("nepa_vit_b_camvit")
    with pytest.raises(ComparisonError, match=r"--segment .*: .*gone"):
        check_segmentation(str(config_file(tmp_path, tmp_path / "gone")))


def test_a_segmentation_that_fails_is_said_with_its_last_line(scenes, tmp_path):
    def fails(command, log):
        log.write_text("something\nwent wrong\n")
        return 3

    with pytest.raises(ComparisonError, match=r"segmentation ended with status 3: went wrong \(see .*frozen\.log\)"):
        segment(Run("a", 0, tmp_path), config_file(tmp_path, scenes), fails, lambda line: None)
    assert Path(tmp_path / "segmentation" / "scenes_seg-frozen.log").is_file()
