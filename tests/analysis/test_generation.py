"""Rolling forward with kept keys and values: equal to the whole pass, and what is read, drawn and refused."""

import csv

import pytest
import timm
import torch
from refusal import refusal

import nepa_plugin
from nepa_plugin.analysis.decoder import PixelDecoder, joined, patch_pixels
from nepa_plugin.analysis.generation import CachedPredictor, roll_forward
from nepa_plugin.checkpoints import save_backbone
from nepa_plugin.commands.generate import main
from nepa_plugin.data import evaluation_loaders


def build(**kwargs):
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "init_values": 1.0}
    model = timm.create_model("nepa_vit_tiny_patch14_224", **(sizes | kwargs)).eval()
    if model.pos_embed is not None:
        torch.nn.init.normal_(model.pos_embed)
    return model


KINDS = {
    "plain": {},
    "QK-norm with weight": {"qk_norm_affine": True},
    "no QK-norm": {"qk_norm": False},
    "SwiGLU": {"swiglu_mlp": True},
    "no LayerScale": {"init_values": 0.0},
    "Hilbert": {"order": "hilbert"},
    "absolute": {"position_embedding": "absolute"},
    "absolute, spiral": {"position_embedding": "absolute", "order": "spiral_out"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [[17], [1] * 17, [1, 4, 1, 7, 4], [5, 12]])
def test_reading_in_parts_gives_the_whole_pass(kind, parts):
    model, images = build(**KINDS[kind]), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        embeddings, expected = model.predict_next(images)
    reader = CachedPredictor(model, 2)
    found = torch.cat([reader.read(part) for part in embeddings.split(parts, dim=1)], dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="18 tokens are more than 1 and 4 x 4 patches"):
        reader.read(embeddings[:, :1])


def test_other_grids():
    model, images = build(dynamic_img_size=True, order="hilbert"), torch.randn(1, 3, 24, 12)
    with torch.no_grad():
        embeddings, expected = model.predict_next(images)
    reader = CachedPredictor(model, 1, (6, 3))
    found = torch.cat([reader.read(part) for part in embeddings.split(1, dim=1)], dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", ["raster", "serpentine"])
def test_a_rollout_reads_its_own_predictions(order):
    """Each rolled embedding is the prediction from all before it, as long as the given ones are on average."""
    model, images = build(order=order), torch.randn(2, 3, 16, 16)
    found = roll_forward(model.train(), images, 6)
    assert model.training
    model.eval()
    with torch.no_grad():
        embeddings, predictions = model.predict_next(images)
        assert torch.equal(found.own, embeddings[:, 1:]) and torch.equal(found.one_step, predictions[:, :-1])
        assert torch.equal(found.rolled[:, :6], found.own[:, :6])
        lengths = found.own[:, :6].norm(dim=-1).mean(dim=1)
        torch.testing.assert_close(found.rolled[:, 6:].norm(dim=-1), lengths[:, None].expand(-1, 10))
        reader = CachedPredictor(model, 2)
        outputs = reader.read(torch.cat([embeddings[:, :1], found.rolled], dim=1))
        cosine = torch.cosine_similarity(outputs[:, 6:-1], found.rolled[:, 6:], dim=-1)
        torch.testing.assert_close(cosine, torch.ones(2, 10), rtol=0, atol=1e-5)
    similarity = found.similarity()
    assert float(similarity["rolled"][0]) == pytest.approx(float(similarity["one step"][0]), abs=1e-5)
    copied = torch.cosine_similarity(found.own[:, 5], found.own[:, 9], dim=-1).mean()
    assert float(similarity["copy"][3]) == pytest.approx(float(copied), abs=1e-6)


def test_what_cannot_be_rolled():
    model, images = build(), torch.randn(1, 3, 16, 16)
    for known in (0, 16):
        with pytest.raises(ValueError, match=f"{known} known patches: give 1 to 15"):
            roll_forward(model, images, known)
    with pytest.raises(ValueError, match="Only causal attention can be rolled forward"):
        roll_forward(model.set_attention("bidirectional"), images, 3)
    absolute = build(position_embedding="absolute", dynamic_img_size=True)
    with pytest.raises(ValueError, match=r"Absolute positions are those of \(4, 4\), not of \(2, 4\)"):
        CachedPredictor(absolute, 1, (2, 4))


def test_patches_and_back():
    images = torch.randn(2, 3, 8, 12)
    pixels = patch_pixels(images, (2, 3))
    assert torch.equal(pixels[1, 4], images[1, :, 4:, 4:8].flatten())
    assert torch.equal(joined(pixels, (2, 3), 3, 8), images)


def test_the_decoder_gives_the_pixels_back():
    model = build(img_size=32)
    train, val = (loader.dataset for loader in evaluation_loaders("digits", model, 1))
    fitted, other = (torch.stack([data[i][0] for i in range(0, 240, 2)]) for data in (train, val))
    decoder = PixelDecoder(model, fitted)
    with torch.no_grad():
        decoded = decoder(model.embed(other)[:, 1:])
    assert decoded.shape == other.shape
    error = (decoded - other).square().mean() / other.var()
    print(f"{float(error):.3f} of the variance is left")
    assert error < 0.1


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    backbone = save_backbone(build(img_size=32, patch_size=8), tmp_path / "backbone")
    arguments = [str(backbone), "--data", "digits", "--known", "0.5", "0.1", "--images", "2"]
    main([*arguments, "--out", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "generation.png",
        "similarity.csv",
        "similarity.png",
    }
    with (tmp_path / "out" / "similarity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["given"]) for row in rows] == [0.5] * 8 + [0.1] * 14
    model = nepa_plugin.load_backbone(backbone)
    val = evaluation_loaders("digits", model, 1)[1].dataset
    scored = torch.stack([val[i][0] for i in range(0, len(val), max(1, len(val) // 200))][:200])
    expected = roll_forward(model, scored, 8).similarity()
    assert [float(row["rolled"]) for row in rows[:8]] == pytest.approx(expected["rolled"].tolist(), abs=1e-4)
    mean = float(expected["copy"].mean())
    assert "50% of the patches given; cosine to the image's own, mean of those after: rolled" in (
        said := capsys.readouterr().out
    )
    assert f"copy {mean:.3f}" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--known", "1.5"), "--known"),
        (("--known", "0"), "--known"),
        (("--images", "0"), "--images must be at least 1, got 0."),
        (("--data", "nowhere"), "no folder at nowhere/train"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, said):
    backbone = save_backbone(build(img_size=32, patch_size=8), tmp_path / "backbone")
    given = ["--data", "digits", *arguments, "--out", str(tmp_path / "out")]
    assert said in refusal(capsys, main, [str(backbone), *given])
    two_ways = save_backbone(build(img_size=32, attention="bidirectional"), tmp_path / "two_ways")
    message = refusal(capsys, main, [str(two_ways), "--data", "digits", "--out", str(tmp_path / "out")])
    assert "has bidirectional attention: only a causal one can be rolled forward" in message
    assert not (tmp_path / "out").exists()
