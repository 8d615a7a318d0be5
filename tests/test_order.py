"""The order in which patches are read: permutations, what is seen and predicted, and that it is never mixed up."""

from itertools import pairwise

import pytest
import timm
import torch
from pretraining import run

import nepa_plugin
from nepa_plugin.analysis.similarity import similarity_maps
from nepa_plugin.checkpoints import CheckpointError, save_backbone
from nepa_plugin.evaluation.features import FrozenFeatures
from nepa_plugin.loss import NextEmbeddingLoss
from nepa_plugin.methods import CPC, IGPT, NEPA
from nepa_plugin.order import PATCH_ORDERS, in_order, patch_order, seen_mask

ORDERS = [*(name for name in PATCH_ORDERS if name != "raster"), "random:7"]
TINY = {"img_size": 24, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 1.0}


def build(order="raster", **kwargs):
    torch.manual_seed(0)
    return timm.create_model("nepa_vit_tiny_patch14_224", **(TINY | kwargs), order=order).eval()


def images(batch=2, size=(24, 24)):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("raster", [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("reversed", [8, 7, 6, 5, 4, 3, 2, 1, 0]),
        ("serpentine", [0, 1, 2, 5, 4, 3, 6, 7, 8]),
        ("columns", [0, 3, 6, 1, 4, 7, 2, 5, 8]),
        ("spiral_in", [0, 1, 2, 5, 8, 7, 6, 3, 4]),
        ("spiral_out", [4, 3, 6, 7, 8, 5, 2, 1, 0]),
    ],
)
def test_orders_of_three_by_three(order, expected):
    assert list(patch_order(order, 3, 3)) == expected


def test_hilberts_curve_of_four_by_four():
    curve = [0, 4, 5, 1, 2, 3, 7, 6, 10, 11, 15, 14, 13, 9, 8, 12]
    mirrored = [index % 4 * 4 + index // 4 for index in curve]
    assert list(patch_order("hilbert", 4, 4)) in (curve, mirrored)


@pytest.mark.parametrize("order", PATCH_ORDERS)
def test_every_order_of_every_grid_is_a_permutation(order):
    for rows in range(1, 21):
        for columns in range(1, 21):
            assert sorted(patch_order(order, rows, columns)) == list(range(rows * columns))


@pytest.mark.parametrize("order", ["serpentine", "hilbert", "spiral_in", "spiral_out"])
def test_neighbours_in_these_orders_share_a_side(order):
    grids = [(rows, columns) for rows in range(1, 21) for columns in range(1, 21)]
    for rows, columns in [*grids, (14, 20), (64, 64), (37, 64), (63, 5)]:
        places = [divmod(index, columns) for index in patch_order(order, rows, columns)]
        assert all(abs(a - c) + abs(b - d) == 1 for (a, b), (c, d) in pairwise(places))


def test_hilberts_curve_keeps_near_what_is_near():
    """Patches up to eight places apart in the order are nearer in the image than in raster order."""

    def distance(order):
        places = [complex(*divmod(index, 16)) for index in patch_order(order, 16, 16)]
        return sum(abs(a - b) for a, b in zip(places, places[8:], strict=False)) / (len(places) - 8)

    assert distance("hilbert") < 0.5 * distance("raster")


def test_random_orders_are_fixed_by_their_seed():
    assert patch_order("random:7", 6, 6) == patch_order("random:7", 6, 6) != patch_order("random:8", 6, 6)
    assert patch_order("random", 6, 6) == patch_order("random:0", 6, 6)


@pytest.mark.parametrize("order", ["zigzag", "random:", "random:x", "hilbert:3", ""])
def test_what_is_no_order(order):
    with pytest.raises(ValueError, match=r"choose one of raster, reversed, .*, random, or random:SEED"):
        build(order)


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_read_later_is_not_seen(order):
    """Changing the patch that is read k-th changes outputs from there on, and none before."""
    model, pixels = build(order), images(1)
    read = patch_order(order, 6, 6)
    for k in (0, 1, 17, 35):
        row, column = divmod(read[k], 6)
        changed = pixels.clone()
        changed[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
        with torch.no_grad():
            (_, before), (_, after) = model.predict_next(pixels), model.predict_next(changed)
            raster_before, raster_after = model.forward_features(pixels), model.forward_features(changed)
        moved = (before - after).abs().amax(dim=(0, 2)) > 1e-6
        assert moved.tolist() == [False] * (1 + k) + [True] * (36 - k)
        moved = (raster_before - raster_after).abs().amax(dim=(0, 2)) > 1e-6
        assert {i for i in range(36) if moved[1 + i]} == set(read[k:])
        assert not moved[0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("position_embedding", ["rope", "absolute"])
def test_features_are_the_predictions_in_raster_order(order, position_embedding):
    model, pixels = build(order, position_embedding=position_embedding), images()
    if position_embedding == "absolute":
        torch.nn.init.normal_(model.pos_embed)
    read = torch.tensor(patch_order(order, 6, 6))
    with torch.no_grad():
        embeddings, predictions = model.predict_next(pixels)
        tokens = model.forward_features(pixels)
        maps = model.get_intermediate_layers(pixels, 1, reshape=True, norm=True)[0]
        assert torch.equal(embeddings[:, 1:], model.embed(pixels)[:, 1:][:, read])
        torch.testing.assert_close(predictions[:, 1:], tokens[:, 1:][:, read], rtol=0, atol=1e-5)
        torch.testing.assert_close(maps.flatten(2).mT, tokens[:, 1:], rtol=0, atol=1e-5)
        assert torch.equal(model.extract_features(pixels, pool="last"), tokens[:, 1 + read[-1]])
        assert torch.equal(FrozenFeatures(model, pool="last")(pixels), tokens[:, 1 + read[-1]])
        model.set_attention("bidirectional")
        raster = build(position_embedding=position_embedding, attention="bidirectional")
        raster.load_state_dict(model.state_dict())
        assert torch.equal(model.forward_features(pixels), raster.forward_features(pixels))


def test_raster_order_has_no_mask_and_no_copy():
    model, pixels = build(), images()
    assert model._own_order is None
    assert model._attention(pixels, None, None) == {"attn_mask": None, "is_causal": True}
    with torch.no_grad():
        assert torch.equal(model.predict_next(pixels)[1], model.forward_features(pixels))


def test_every_image_has_an_order_of_its_own_in_training():
    model, pixels = build("random"), images(1).expand(3, -1, -1, -1)
    with torch.no_grad():
        assert torch.equal(*(model.predict_next(pixels)[0] for _ in range(2)))
        model.train()
        torch.manual_seed(3)
        first, again = model.predict_next(pixels)[0], model.predict_next(pixels)[0]
    patches = model.embed(pixels)[0, 1:].detach()
    for one in (*first, *again):
        assert sorted(one[1:, 0].tolist()) == sorted(patches[:, 0].tolist())
    assert len({tuple(one[1:, 0].tolist()) for one in (*first, *again)}) == 6


def test_in_each_images_order_tokens_and_positions_go_together(monkeypatch):
    """In training, with one order drawn for each image, predictions are those of each image alone in that order."""
    model, pixels = build("random", rope_rescale_coords=1.0).train(), images(3)
    numbers = torch.rand(3, 36)
    drawn = numbers.argsort(dim=1)
    monkeypatch.setattr(torch, "rand", lambda *shape, device: numbers)
    with torch.no_grad():
        together = model.predict_next(pixels)[1]
        for b in range(3):
            model._own_order, model.order = drawn[b], "random:1"
            alone = model.predict_next(pixels[b : b + 1])[1]
            torch.testing.assert_close(together[b : b + 1], alone, rtol=0, atol=1e-5)


def test_masks_and_tokens_in_order():
    order = torch.tensor([[2, 0, 1], [0, 2, 1]])
    mask = seen_mask(order, 1)[:, 0].int().tolist()
    assert mask[0] == [[1, 0, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1], [1, 0, 0, 1]]
    assert mask[1] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 1]]
    assert torch.equal(seen_mask(order[0], 1), torch.tensor(mask[0]).bool())
    tokens = torch.arange(3.0)[None, :, None].expand(2, 3, 2)
    assert in_order(tokens, order)[..., 0].tolist() == [[2, 0, 1], [0, 2, 1]]
    assert in_order(tokens[0], order[0])[..., 0].tolist() == [2, 0, 1]


def test_masked_patches_are_the_same_in_every_order():
    mask = torch.zeros(1, 36, dtype=torch.bool)
    mask[0, 5] = True
    token = torch.zeros(1, 1, 32)
    for order in ("raster", "hilbert"):
        model, pixels = build(order), images(1)
        seen = model.predict_next(pixels, masked=mask, mask_token=token)[1]
        place = patch_order(order, 6, 6).index(5)
        plain = model.predict_next(pixels)[1]
        moved = (seen - plain).abs().amax(dim=(0, 2)) > 1e-6
        assert moved.tolist() == [False] * (1 + place) + [True] * (36 - place)


def test_other_image_sizes_have_their_own_order():
    model = build("hilbert", dynamic_img_size=True)
    pixels = images(1, (24, 40))
    read = torch.tensor(patch_order("hilbert", 6, 10))
    with torch.no_grad():
        torch.testing.assert_close(
            model.predict_next(pixels)[1][:, 1:], model.forward_features(pixels)[:, 1:][:, read], rtol=0, atol=1e-5
        )
        with pytest.raises(ValueError, match="The last token in hilbert order is known at 6 x 6 patches alone"):
            model.extract_features(pixels, pool="last")
    model.set_input_size((24, 40))
    assert torch.equal(model._own_order, read)


def test_the_order_stays_with_the_backbone(tmp_path):
    save_backbone(build("spiral_out"), tmp_path / "spiral")
    loaded = nepa_plugin.load_backbone(tmp_path / "spiral")
    assert loaded.order == "spiral_out"
    assert torch.equal(loaded.predict_next(images())[1], build("spiral_out").predict_next(images())[1])
    save_backbone(build().set_order("columns"), tmp_path / "columns")
    assert nepa_plugin.load_backbone(tmp_path / "columns").order == "columns"
    with pytest.raises(CheckpointError, match="raster order, not in spiral_out order"):
        save_backbone(loaded, tmp_path / "published", layout="nepa")


ARGS = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def method(cls=NEPA, order="raster", **kwargs):
    args = {"backbone": "nepa_vit_tiny_patch14_224", "img_size": 24, "patch_size": 4, "num_classes": 0}
    return cls(**args, backbone_args=ARGS | {"order": order}, **kwargs)


def test_nothing_is_started_from_another_order(tmp_path):
    save_backbone(build("hilbert", **ARGS), tmp_path / "hilbert")
    assert method(order="hilbert", init_from=str(tmp_path / "hilbert")).backbone.order == "hilbert"
    with pytest.raises(CheckpointError, match="in hilbert order, and the model reads them in raster order"):
        method(init_from=str(tmp_path / "hilbert"))
    with pytest.raises(ValueError, match="iGPT reads patches in raster order"):
        method(IGPT, "hilbert")
    assert method(CPC, "hilbert").backbone.order == "hilbert"


def test_the_loss_is_that_of_the_sequence_as_it_is_read():
    nepa = method(order="hilbert").eval()
    loss, _ = nepa.step([images()])
    tokens, embeddings = nepa.backbone.forward_features(images()), nepa.backbone.embed(images())
    read = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.tensor(patch_order("hilbert", 6, 6))])
    torch.testing.assert_close(loss, NextEmbeddingLoss()(embeddings[:, read], tokens[:, read]), rtol=0, atol=1e-6)


def test_similarity_is_of_the_patch_that_is_read_next():
    model, pixels = build("hilbert"), images(1)
    read = patch_order("hilbert", 6, 6)
    with torch.no_grad():
        embeddings, predictions = model.predict_next(pixels)
    maps = similarity_maps(model, pixels, [read[0], read[9]]).flatten(2)
    for row, place in zip(maps[0], (0, 9), strict=True):
        expected = torch.cosine_similarity(predictions[0, place], embeddings[0, 1:], dim=-1)
        torch.testing.assert_close(row[list(read)], expected)


def test_a_run_goes_on_in_its_own_order(tmp_path, capsys):
    run("--model.backbone_args.order", "serpentine", "--trainer.max_steps", "2", "--run_dir", tmp_path / "run")
    assert nepa_plugin.load_backbone(tmp_path / "run" / "backbone").order == "serpentine"
    capsys.readouterr()
    run("--run_dir", tmp_path / "run", "--ckpt_path", "last", code=2)
    said = capsys.readouterr().err
    assert "was trained with patches in serpentine order, and the model reads them in raster order" in said
    assert said.count("\n") == 1
