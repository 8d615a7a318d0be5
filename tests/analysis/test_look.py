"""Surprise, principal components, regions, and the page in which a click on a patch shows its maps."""

import base64
import csv
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from refusal import refusal
from sklearn.datasets import load_sample_images

import nepa_plugin
from nepa_plugin.analysis.components import principal_colours, similarity_by_region
from nepa_plugin.analysis.figures import plot_attention, plot_surprise
from nepa_plugin.analysis.generation import roll_forward
from nepa_plugin.analysis.look import look
from nepa_plugin.analysis.page import write_page
from nepa_plugin.analysis.regions import patch_labels
from nepa_plugin.analysis.similarity import similarity_maps
from nepa_plugin.analysis.surprise import most_surprising, surprise
from nepa_plugin.checkpoints import save_backbone
from nepa_plugin.commands.visualize import main
from nepa_plugin.data.errors import DataError
from nepa_plugin.data.evaluation import ImageFormat
from nepa_plugin.loss import NextEmbeddingLoss
from nepa_plugin.methods import CPC, NEPA
from nepa_plugin.order import patch_order

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def build(**kwargs):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "init_values": 1.0}
    return timm.create_model("nepa_vit_tiny_patch14_224", **(sizes | kwargs)).eval()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name, pixels in zip(("temple", "flower"), load_sample_images().images, strict=True):
        Image.fromarray(pixels).resize((80, 60)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_backbone(build(), tmp_path_factory.mktemp("backbone") / "backbone")


@pytest.mark.parametrize("order", ["raster", "hilbert"])
def test_mean_surprise_is_one_plus_the_loss(order):
    model, images = build(order=order), torch.randn(3, 3, 32, 32)
    found = surprise(model, images)
    with torch.no_grad():
        embeddings, predictions = model.predict_next(images)
    loss = NextEmbeddingLoss()
    assert float(found.score.mean()) == pytest.approx(1 + float(loss(embeddings, predictions)), abs=1e-5)
    copying = 1 + float(loss(embeddings[:, 1:], embeddings[:, 1:]))  # of the patches after the first
    assert float(found.copying.nanmean()) == pytest.approx(copying, abs=1e-5)
    first, second = patch_order(order, 4, 4)[:2]
    assert found.copying[0].flatten()[first].isnan() and found.copying.isnan().sum() == 3
    by_hand = 1 - torch.cosine_similarity(predictions[:, 1], model.embed(images)[:, 1 + second], dim=-1)
    torch.testing.assert_close(found.predicting.flatten(1)[:, second], by_hand)


def test_a_long_path_stays_over_its_own_panel():
    long = "a/long/way/to/" + "photo_" * 9 + ".jpg"
    for name, title in ((long, "photo_photo_photo_photo_phot"), ("7/1411.png", "7/1411.png")):
        (one,) = look(build(), torch.randn(1, 3, 32, 32), [name], [1])
        figure = plot_surprise([one], {name: 0.25})
        assert [axes.get_title() for axes in figure.axes][:2] == [title, "predicted: 0.250"]


def test_images_are_sorted_by_surprise():
    model, images = build(), torch.randn(5, 3, 32, 32)
    ranked = most_surprising(model, [images[:2], images[2:]])
    scores = surprise(model, images).score
    assert [index for index, _ in ranked] == scores.argsort(descending=True).tolist()
    assert [score for _, score in ranked] == pytest.approx(scores.sort(descending=True).values.tolist(), abs=1e-6)


def test_colours_are_the_first_components():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(2, 3, 4, 5, generator=generator) * torch.tensor([9.0, 3.0, 1.0])[:, None, None]
    mixing = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0][:, :3]
    colours = principal_colours(torch.einsum("dc,bcij->bdij", mixing, hidden))
    assert colours.shape == (2, 3, 4, 5) and float(colours.min()) >= 0 and float(colours.max()) <= 1
    for channel in range(3):
        pair = torch.stack([colours[:, channel].flatten(), hidden[:, channel].flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) > 0.95


def test_similarity_inside_and_outside_of_regions():
    features = torch.zeros(2, 2, 2)
    features[0, :, 0] = features[1, :, 1] = 1.0  # left and right half
    labels = torch.tensor([[3, 4], [3, 4]])
    assert similarity_by_region(features, labels) == (1.0, 0.0)
    assert similarity_by_region(features, torch.tensor([[3, 255], [4, 255]]))[1] == 1.0


def test_label_maps_are_cropped_as_the_images_are(tmp_path):
    labels = np.zeros((64, 80), np.uint8)
    labels[:, 40:] = 7
    Image.fromarray(labels).save(tmp_path / "a.png")
    form = ImageFormat.of(build())
    found = patch_labels(tmp_path / "a.png", form, (4, 4))
    assert found.tolist() == [[0, 0, 7, 7]] * 4
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    with pytest.raises(DataError, match="is no 8-bit map of labels"):
        patch_labels(tmp_path / "b.png", form, (4, 4))


@pytest.fixture(scope="module")
def looks():
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    return look(build(), images, ["a", "</script>b"], [1, 3])


def test_a_look_has_every_map(looks):
    names = [(each.group, each.name) for each in looks[0].maps]
    assert ("attention, layer 3", "rollout") in names and ("attention, layer 1", "head 2") in names
    assert not any(group == "attention, layer 2" for group, _ in names)
    assert all(each.values.shape == ((16, 16) if each.by_patch else (16,)) for each in looks[0].maps)
    with pytest.raises(ValueError, match=r"Layers \[4\] are not in 1..3"):
        look(build(), torch.randn(1, 3, 32, 32), ["a"], [4])


def decoded(page):
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S).group(1))
    return data["images"]


def test_the_page_holds_the_numbers_and_fetches_nothing(looks, tmp_path):
    write_page(looks, tmp_path / "page.html", "A <title>", "About & so on")
    page = (tmp_path / "page.html").read_text()
    assert "A &lt;title&gt;" in page and "About &amp; so on" in page
    assert not re.search(r"(src|href)\s*=\s*[\"']?http|@import|url\(", page)
    for one, image in zip(looks, decoded(page), strict=True):
        assert (image["name"], image["rows"], image["columns"]) == (one.name, 4, 4)
        for each, stored in zip(one.maps, image["maps"], strict=True):
            levels = np.frombuffer(base64.b64decode(stored["values"]), np.uint8).reshape(-1, 16)
            low, high = (np.frombuffer(base64.b64decode(stored[k]), np.float32)[:, None] for k in ("low", "high"))
            wanted = torch.atleast_2d(each.values).numpy()
            known = np.isfinite(wanted)
            error = np.abs(low + levels / 255 * (high - low) - wanted)[known]
            assert error.max() <= 0.51 / 255 * float((high - low).max()) + 1e-6


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_click_shows_the_maps_of_its_patch(looks, tmp_path):
    write_page(looks, tmp_path / "page.html", "Look", "")
    page = (tmp_path / "page.html").read_text()
    maps = [(each.group, each.name) for each in looks[0].maps]
    chosen = maps.index(("attention, layer 3", "mean of heads"))
    # the patch in row 4, column 2 of 4 x 4
    script = f"""<script>addEventListener("load", () => {{
        const select = document.getElementById("map"); select.value = {chosen}; select.onchange({{target: select}});
        const canvas = document.getElementById("picture"), box = canvas.getBoundingClientRect();
        const at = {{clientX: box.left + box.width * 0.3, clientY: box.top + box.height * 0.9, bubbles: true}};
        canvas.dispatchEvent(new MouseEvent("click", at));
    }});</script>"""
    (tmp_path / "clicked.html").write_text(page.replace("</body>", f"{script}</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=3000", "--dump-dom", (tmp_path / "clicked.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    def text(name):
        return re.search(rf'id="{name}"[^>]*>([^<]*)<', shown).group(1)

    row = looks[0].maps[chosen].values[13]
    best = int(row.argmax())
    assert text("name") == "a: patch in row 4, column 2 of 4 x 4"
    place = f"row {best // 4 + 1}, column {best % 4 + 1}"
    assert text("said") == f"attention, layer 3, mean of heads: largest in {place} (dashed)"
    assert float(text("high")) == pytest.approx(float(row.max()), rel=1e-2)


def test_the_command_writes_a_folder(backbone, photos, tmp_path, capsys):
    labels = tmp_path / "labels"
    labels.mkdir()
    for name in ("temple", "flower"):
        Image.fromarray(np.repeat(np.array([[0, 1]], np.uint8), 40, axis=1).repeat(60, axis=0)).save(
            labels / f"{name}.png"
        )
    main([str(backbone), str(photos), "--out", str(tmp_path / "look"), "--labels", str(labels), "--layers", "2"])
    out = tmp_path / "look"
    pictures = {"similarity", "attention", "surprise", "components", "statistics"}
    assert {path.name for path in out.iterdir()} == {
        *(f"{name}.png" for name in pictures),
        *("index.html", "surprise.csv", "attention.csv", "regions.csv"),
    }
    with (out / "surprise.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["surprise"]) >= float(rows[1]["surprise"])
    with (out / "attention.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3 * 2
    assert len(decoded((out / "index.html").read_text())) == 2
    printed = capsys.readouterr().out
    assert f"{rows[0]['image']}: surprise {float(rows[0]['surprise']):.3f}" in printed
    assert "cosine of patches of one region" in printed
    both = [sum(float(row[name]) for row in rows) / 2 for name in ("surprise", "surprise_of_copying")]
    assert f"All 2 images: surprise {both[0]:.3f}, of copying {both[1]:.3f} on average" in printed


def test_the_attention_picture_shows_the_heads_asked_for():
    looks = look(build(), torch.randn(1, 3, 32, 32), ["a"], [1, 3])
    (*means, _), (*heads, _) = (plot_attention(looks, [1, 3], 5, shown).axes[1:] for shown in ((), (2,)))
    for kind, panels in (("mean of heads", means), ("head 2", heads)):
        for layer, panel in zip((1, 3), panels, strict=True):
            (own,) = (each for each in looks[0].maps if (each.group, each.name) == (f"attention, layer {layer}", kind))
            drawn = torch.as_tensor(panel.images[-1].get_array().filled())
            torch.testing.assert_close(drawn.flatten(), own.values[5], check_dtype=False)
    assert [panel.get_title().split(":")[0] for panel in heads] == ["layer 1 head 2", "layer 3 head 2"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("{photos}", "--data", "digits"), "Give either images or --data."),
        ((), "Give either images or --data."),
        (("{photos}/gone.png",), "No image at"),
        (("{photos}", "--layers", "0"), "Layers [0] are not in 1..3."),
        (("{photos}", "--heads", "1", "3"), "Heads [3] are not in 1..2."),
        (("{photos}", "--queries", "16"), "Query patches [16] are not in 0..15."),
        (("{photos}", "--labels", "{photos}/none"), "give a folder, and a folder as --out."),
        (("{photos}", "--labels", "{backbone}"), "--labels: there is no "),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(backbone, photos, tmp_path, capsys, arguments, said):
    out = tmp_path / "look"
    given = [argument.format(photos=photos, backbone=backbone) for argument in arguments]
    assert said in refusal(capsys, main, [str(backbone), *given, "--out", str(out)])
    assert not out.exists()


def test_outputs_that_are_no_predictions_are_not_taken_for_some(photos, tmp_path, capsys):
    args = {"embed_dim": 32, "depth": 3, "num_heads": 2}
    sizes = {"backbone": "nepa_vit_tiny_patch14_224", "img_size": 32, "patch_size": 8, "num_classes": 0}
    kept, thrown = (NEPA(**sizes, backbone_args=args, predictor_head=head).backbone for head in ("none", "mlp"))
    assert kept.predicts and not thrown.predicts and not CPC(**sizes, backbone_args=args).backbone.predicts
    backbone = save_backbone(thrown, tmp_path / "backbone")
    assert not nepa_plugin.load_backbone(backbone).predicts
    for call in (similarity_maps, roll_forward):
        with pytest.raises(ValueError, match="outputs are no predictions of embeddings"):
            call(thrown, torch.randn(1, 3, 32, 32), [0] if call is similarity_maps else 3)
    with pytest.raises(ValueError, match="outputs are no predictions of embeddings"):
        surprise(thrown, torch.randn(1, 3, 32, 32))
    main([str(backbone), str(photos), "--out", str(tmp_path / "look")])
    assert "there is neither similarity nor surprise" in capsys.readouterr().out
    assert {path.stem for path in (tmp_path / "look").glob("*.png")} == {"attention", "components", "statistics"}
    message = refusal(capsys, main, [str(backbone), str(photos), "--out", str(tmp_path / "similarity.png")])
    assert "outputs are no predictions of embeddings" in message
    assert not (tmp_path / "similarity.png").exists()
