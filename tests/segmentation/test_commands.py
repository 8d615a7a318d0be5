"""The commands as a user types them: tools, mim train, --resume, mim test, and two processes without a GPU."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmseg")
pytest.importorskip("mim")
from PIL import Image
from refusal import refusal
from tiny import CONFIGS, as_options, losses, tiny_options

from nepa_plugin.checkpoints import read_tensors
from nepa_plugin.commands import make_digit_scenes, segment

ROOT = CONFIGS.parent
MIM = [sys.executable, "-m", "mim"]
TOOLS = ROOT / "tools"


def _installed(name):
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


PACKAGE = "mmsegmentation" if _installed("mmsegmentation") else "onedl-mmsegmentation"


def command(*args, check=True, **kwargs):
    environment = dict(os.environ, OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1")
    done = subprocess.run([*map(str, args)], capture_output=True, text=True, timeout=600, env=environment, **kwargs)
    output = done.stdout + done.stderr
    if check:
        assert done.returncode == 0, output[-3000:]
    return output


@pytest.fixture(scope="module")
def options(scenes, backbone_folder):
    return as_options(tiny_options(scenes, backbone_folder))


def train(work_dir, options, *args, config="nepa_tiny_digits_seg.py", **kwargs):
    return command(*MIM, "train", PACKAGE, CONFIGS / config, "--work-dir", work_dir, *args, *options, **kwargs)


def mean_iou(output):
    return float(re.findall(r"mIoU: ([\d.]+)", output)[-1])


@pytest.mark.slow
def test_train_test_and_segment(scenes, options, tmp_path):
    work_dir = tmp_path / "w"
    train(work_dir, options)
    assert list(losses(work_dir)) == [1, 2, 3, 4]
    (best,) = work_dir.glob("best_mIoU_iter_*.pth")
    tested = command(*MIM, "test", PACKAGE, CONFIGS / "nepa_tiny_digits_seg.py", "--checkpoint", best,
                     "--work-dir", tmp_path / "t", *options)  # fmt: skip
    images = sorted((scenes / "images/validation").iterdir())
    (config,) = work_dir.glob("*.py")
    said = command(sys.executable, TOOLS / "segment.py", config, best, *images, "--out", tmp_path / "out")
    assert f"mIoU {mean_iou(tested):.1f} % over 7 image(s) with labels" in said
    assert len(list((tmp_path / "out").glob("*.png"))) == 7
    with Image.open(tmp_path / "out" / "000_0000.png") as picture:
        assert min(picture.size) > 150
    with (tmp_path / "out" / "class_iou.csv").open() as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert float(rows["mean"]["IoU"]) == pytest.approx(mean_iou(tested), abs=0.011)
    assert rows["background"]["IoU"] and len(rows) == 12


@pytest.mark.slow
def test_resume_after_a_kill(scenes, options, tmp_path):
    """SIGKILL in the middle; --resume goes on from the last checkpoint and reaches the end."""
    work_dir = tmp_path / "w"
    longer = [*options, "train_cfg.max_iters=40", "param_scheduler.1.end=40", "train_cfg.val_interval=40"]
    args = [*MIM, "train", PACKAGE, CONFIGS / "nepa_tiny_digits_seg.py", "--work-dir", work_dir, *longer]
    process = subprocess.Popen(
        [*map(str, args)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not (work_dir / "iter_4.pth").is_file() and time.monotonic() < deadline:
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    stopped_at = int((work_dir / "last_checkpoint").read_text().rsplit("_", 1)[1].removesuffix(".pth"))
    assert 0 < stopped_at < 40
    refused = train(work_dir, longer, check=False)
    assert "error: " in refused and "Add --resume to go on with it" in refused
    output = train(work_dir, longer, "--resume")
    assert f"iter: {stopped_at}" in output
    assert (work_dir / "iter_40.pth").is_file() and list(losses(work_dir))[-1] == 40
    assert read_tensors(work_dir / "iter_40.pth")["meta"]["iter"] == 40


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the config is for machines without CUDA")
def test_two_processes(scenes, options, tmp_path):
    config, work_dir = "nepa_tiny_digits_seg_cpu_ddp.py", tmp_path / "w"
    distributed = ["--launcher", "pytorch", "--gpus", "2"]
    output = train(work_dir, options, *distributed, config=config)
    assert "Global batch 16 = 8 per device x 2 device(s)" in output
    assert list(losses(work_dir)) == [1, 2, 3, 4]
    # the 7 validation images are no multiple of two processes; each counts once
    tested = [
        command(
            *MIM,
            "test",
            PACKAGE,
            CONFIGS / config,
            "--checkpoint",
            work_dir / "iter_4.pth",
            "--work-dir",
            tmp_path / f"t{len(extra)}",
            *extra,
            *options,
        )
        for extra in ([], distributed)
    ]
    assert mean_iou(tested[0]) == mean_iou(tested[1])


def test_make_digit_scenes(tmp_path, capsys):
    folder = tmp_path / "scenes"
    arguments = [str(folder), "--training", "2", "--validation", "1"]
    make_digit_scenes.main(arguments)
    assert capsys.readouterr().out == f"Wrote {folder}\n"
    assert len(list(folder.rglob("*.png"))) == 6
    assert str(folder) in refusal(capsys, make_digit_scenes.main, arguments)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nothing.py", "nothing.pth", "nothing.jpg"], "no image file at nothing.jpg"),
        ([CONFIGS / "nepa_tiny_digits_seg.py", "nothing.pth", Path(__file__)], "No checkpoint at nothing.pth"),
        (["nothing.py", "nothing.pth", Path(__file__)], "No config file at nothing.py"),
    ],
)
def test_bad_input_of_segment(args, message, tmp_path, capsys):
    said = refusal(capsys, segment.main, [*map(str, args), "--out", str(tmp_path / "o")])
    assert said.startswith(f"error: {message}")
    assert not (tmp_path / "o").exists()


def test_segment_checks_every_file_first(run, scenes, tmp_path, capsys):
    good = scenes / "images/validation/0000.png"
    for kind in ("images", "annotations"):
        (tmp_path / kind).mkdir()
    bad, text = tmp_path / "images" / "a.png", tmp_path / "images" / "b.png"
    bad.write_bytes(good.read_bytes())
    text.write_text("no image")
    Image.new("L", (32, 32), 1).save(tmp_path / "annotations" / "a.png")
    for image, message in ((bad, "a.png has another size than its image"), (text, "cannot be read as an image")):
        arguments = [run / "config.py", run / "iter_4.pth", good, image, "--out", tmp_path / "o"]
        assert message in refusal(capsys, segment.main, [*map(str, arguments)])
        assert not (tmp_path / "o").exists()
