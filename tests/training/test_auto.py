"""Numbers that follow from the data: the published ones for ImageNet, others for few images, all said and saved."""

from dataclasses import replace

import pytest
import yaml
from pretraining import BASE, DIGITS, FAST, run

from nepa_plugin.comparison.plan import ComparisonError
from nepa_plugin.comparison.search import choices
from nepa_plugin.training.auto import OPTIONS, Facts, resolve
from nepa_plugin.training.cli import main
from nepa_plugin.training.run_folder import UsageError

IMAGENET = Facts(images=1_281_167, batch=4096, img_size=224, side=433.0)
DIGITS_FACTS = Facts(images=1400, batch=64, img_size=32, side=32.0)


def values(facts, *wanted):
    return {name: value for name, (value, _) in resolve(list(wanted or OPTIONS), facts).items()}


def test_imagenets_numbers_are_the_published_ones():
    assert values(IMAGENET) == {
        "trainer.max_epochs": 1600,
        "model.warmup_fraction": 0.025,
        "model.ema_decay": 0.9999,
        "model.base_lr": 3e-4,
        "model.crop_scale": [0.08, 1.0],
    }


def test_ten_times_the_images_take_the_published_steps():
    steps = -(-500_000 // (12_811_670 // 4096))
    assert values(replace(IMAGENET, images=12_811_670), "trainer.max_epochs") == {"trainer.max_epochs": steps}


def test_few_images():
    found = values(DIGITS_FACTS)
    assert found["trainer.max_epochs"] == 1600  # 33,600 steps of 21 per epoch
    assert found["model.warmup_fraction"] == 0.025
    assert found["model.ema_decay"] == pytest.approx(1 - 5 / 33_600, abs=1e-5)
    assert found["model.base_lr"] == pytest.approx(4.8e-3 * (64 / 4096) ** 0.5 * 256 / 64)
    assert found["model.crop_scale"] == [0.25, 1.0]


def test_a_hundred_images_take_more_epochs_than_published():
    assert values(replace(DIGITS_FACTS, images=100), "trainer.max_epochs") == {"trainer.max_epochs": 10_000}


@pytest.mark.parametrize(
    ("steps", "fraction"), [(420, 0.1), (5_000, 0.1), (10_000, 0.05), (20_000, 0.025), (500_000, 0.025)]
)
def test_warmup_is_at_least_500_steps_and_at_most_a_tenth(steps, fraction):
    facts = replace(DIGITS_FACTS, max_steps=steps)
    assert values(facts, "model.warmup_fraction") == {"model.warmup_fraction": fraction}


@pytest.mark.parametrize(("side", "least"), [(8, 0.5), (32, 0.25), (48, 0.11), (64, 0.08), (500, 0.08)])
def test_the_smallest_crop_is_drawn_up_to_twice_its_size(side, least):
    assert values(replace(DIGITS_FACTS, side=side), "model.crop_scale") == {"model.crop_scale": [least, 1.0]}


@pytest.mark.parametrize(
    ("facts", "option", "said"),
    [
        (replace(DIGITS_FACTS, side=None), "model.crop_scale", "auto needs images that can be looked at"),
        (replace(DIGITS_FACTS, epochs=-1), "model.ema_decay", "auto needs a run with an end"),
    ],
)
def test_what_cannot_be_known_is_said(facts, option, said):
    with pytest.raises(UsageError, match=said):
        resolve([option], facts)


def test_a_run_saves_and_says_the_numbers(tmp_path, caplog):
    config = tmp_path / "auto.yaml"
    init_args = {"base_lr": "auto", "ema_decay": "auto", "crop_scale": "auto"}
    config.write_text(yaml.safe_dump({"base": str(DIGITS), "model": {"init_args": init_args}}))
    typed = ["--model.warmup_fraction=auto", "--model.ema_decay", "0.5", "--trainer.max_epochs", "auto"]
    main(
        [
            *("--config", str(config), *FAST, *typed, "--trainer.max_steps", "3", "--run_dir", str(tmp_path / "run")),
            *("--trainer.limit_val_batches", "0"),
        ],
        BASE,
    )
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    args = saved["model"]["init_args"]
    assert args["base_lr"] == pytest.approx(4.8e-3 * (128 / 4096) ** 0.5 * 256 / 128, rel=1e-2)
    assert args["warmup_fraction"] == 0.1
    assert args["ema_decay"] == 0.5  # typed last
    assert args["crop_scale"] == [0.25, 1.0]
    assert saved["trainer"]["max_epochs"] == 1600
    assert "model.crop_scale: auto is [0.25, 1.0] (images are about 32 pixels a side" in caplog.text


def test_print_config_prints_the_numbers(capsys):
    with pytest.raises(SystemExit):
        main(["--config", str(DIGITS), "--model.base_lr", "auto", "--print_config"], BASE)
    args = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert args["base_lr"] == 0.0017


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "MAE", "--model.base_lr", "auto"], "model.base_lr: auto follows NEPA's recipe"),
        (["--model.min_lr", "auto"], "min_lr: expected float, got auto."),
        (["--model.ema_decay", "auto", "--trainer.max_epochs", "-1"], "auto needs a run with an end"),
    ],
)
def test_where_there_is_no_auto(arguments, said, capsys, tmp_path):
    run(*arguments, "--run_dir", tmp_path / "run", code=2)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_search_needs_a_number_to_search_about():
    config = {"model": {"class_path": "nepa_plugin.methods.NEPA", "init_args": {"base_lr": "auto"}}}
    with pytest.raises(ComparisonError, match="base_lr is auto"):
        choices(config, 2, None)
