"""NEPA over sequences: positions, padding, and digits as rows of pixels."""

import pytest
import timm
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn

import nepa_plugin
from nepa_plugin import NextEmbeddingLoss
from nepa_plugin.models import EmbeddingSequence

LENGTHS = [9, 4, 7, 1]


def build(attention="causal", **kwargs):
    torch.manual_seed(0)
    args = {"input_dim": 6, "embed_dim": 32, "depth": 2, "num_heads": 2, "attention": attention}
    model = timm.create_model("nepa_sequence_tiny", **(args | kwargs))
    for block in model.blocks:  # LayerScale starts so small that attention hardly shows
        nn.init.ones_(block.gamma_1)
        nn.init.ones_(block.gamma_2)
    return model


@pytest.fixture
def sequences():
    return torch.randn(4, 9, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def padding():
    return torch.arange(9) >= torch.tensor(LENGTHS)[:, None]


def loss_and_gradients(model, sequences, padding):
    model.zero_grad()
    embeddings, predictions = model.predict_next(sequences, padding=padding)
    loss = NextEmbeddingLoss()(embeddings, predictions, model.valid(padding))
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_padded_sequences_are_the_sequences_one_by_one(attention, sequences, padding):
    model = build(attention)
    loss, gradients = loss_and_gradients(model, sequences, padding)
    alone = [model.predict_next(one[None, :length]) for one, length in zip(sequences, LENGTHS, strict=True)]
    # each element is a target, the first one of the class token's output
    expected = sum(NextEmbeddingLoss()(*pair) * length for pair, length in zip(alone, LENGTHS, strict=True)) / sum(
        LENGTHS
    )
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    tokens = model.forward_features(sequences, padding)
    for one, (_, predictions), length in zip(tokens, alone, LENGTHS, strict=True):
        torch.testing.assert_close(one[: length + 1], predictions[0], rtol=0, atol=1e-5)
    model.zero_grad()
    expected.backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_what_stands_in_padding_changes_nothing(attention, garbage, sequences, padding):
    model = build(attention)
    loss, gradients = loss_and_gradients(model, sequences, padding)
    other, others = loss_and_gradients(model, sequences.masked_fill(padding[:, :, None], garbage), padding)
    assert torch.equal(loss, other)
    assert gradients.keys() == others.keys() and all(torch.equal(gradients[name], others[name]) for name in gradients)


def test_padding_may_be_anywhere(sequences):
    """A gap is no element: with the positions of those that are there, the others read the same."""
    model = build()
    gap = torch.zeros(4, 9, dtype=torch.bool)
    gap[:, 3:5] = True
    kept = [0, 1, 2, 5, 6, 7, 8]
    whole = model.forward_features(sequences, gap)
    short = model.forward_features(sequences[:, kept], positions=torch.tensor(kept))
    torch.testing.assert_close(whole[:, [0, *(i + 1 for i in kept)]], short, rtol=0, atol=1e-5)


def test_later_elements_change_no_earlier_prediction(sequences):
    model, other = build(), sequences.clone()
    other[:, 5:] += 1.0
    first, second = model.forward_features(sequences), model.forward_features(other)
    torch.testing.assert_close(first[:, :6], second[:, :6], rtol=0, atol=1e-6)
    assert (first[:, 6:] - second[:, 6:]).abs().amax(dim=-1).min() > 0.01


def test_positions_matter_by_their_distances(sequences):
    model = build(class_token=False)
    one, two = (model.forward_features(sequences, positions=torch.arange(9) + shift) for shift in (0, 100))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)
    spread = model.forward_features(sequences, positions=3 * torch.arange(9))
    assert (one - spread).abs().max() > 0.01
    each = torch.arange(9).expand(4, 9)
    torch.testing.assert_close(model.forward_features(sequences, positions=each), one, rtol=0, atol=1e-6)
    plane = torch.stack([torch.arange(9), torch.zeros(9)], dim=1)
    assert (model.forward_features(sequences, positions=plane) - one).abs().max() > 0.001


def test_patches_given_as_embeddings_at_their_places_are_the_image():
    torch.manual_seed(0)
    model = timm.create_model("nepa_vit_tiny_patch14_224", depth=2).eval()
    for block in model.blocks:
        nn.init.ones_(block.gamma_1)
    images = torch.randn(2, 3, 224, 224)
    embeddings, predictions = model.predict_next(images)
    rows, columns = torch.meshgrid(torch.arange(16) - 7.5, torch.arange(16) - 7.5, indexing="ij")
    places = torch.stack([rows, columns], dim=-1).view(256, 2)
    again, found = model.predict_next(embeddings=embeddings[:, 1:], positions=places)
    assert torch.equal(again, embeddings)
    torch.testing.assert_close(found, predictions, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positions": torch.arange(8)}, r"Expected positions \(9,\), \(4, 9\), \(9, 2\) or \(4, 9, 2\), got \(8,\)"),
        ({"padding": torch.zeros(4, 8, dtype=torch.bool)}, r"Expected padding as booleans \(4, 9\), got \(4, 8\)"),
        ({"padding": torch.zeros(4, 9)}, r"Expected padding as booleans \(4, 9\)"),
    ],
)
def test_wrong_shapes(arguments, message, sequences):
    with pytest.raises(ValueError, match=message):
        build().predict_next(sequences, **arguments)


def test_what_does_not_go_together(sequences):
    with pytest.raises(ValueError, match=r"Expected sequences \(B, T, 6\), got \(4, 9, 5\)"):
        build()(sequences[..., :5])
    vit = timm.create_model("nepa_vit_tiny_patch14_224", depth=1)
    images, embeddings = torch.zeros(1, 3, 224, 224), torch.zeros(1, 4, 192)
    for given in ({}, {"images": images, "embeddings": embeddings}):
        with pytest.raises(ValueError, match="either images or embeddings"):
            vit.predict_next(**given)
    with pytest.raises(ValueError, match="positions and padding go with embeddings"):
        vit.predict_next(images, positions=torch.arange(256))
    with pytest.raises(ValueError, match=r"Expected embeddings \(B, T, 192\), got \(1, 4, 64\)"):
        vit.predict_next(embeddings=embeddings[..., :64])
    with pytest.raises(ValueError, match="no intermediate features"):
        build().get_intermediate_layers(sequences)


def test_a_folder_holds_it_as_it_holds_other_backbones(sequences, padding, tmp_path):
    model = build("bidirectional").eval()
    nepa_plugin.save_backbone(model, tmp_path)
    loaded = nepa_plugin.load_backbone(tmp_path)
    assert isinstance(loaded, EmbeddingSequence) and loaded.attention == "bidirectional"
    assert torch.equal(loaded(sequences, padding), model(sequences, padding))
    assert build(num_classes=5)(sequences).shape == (4, 5)


def rows_learned(rows, labels):
    """Linear probe of the mean token before and after 200 steps, in per cent, and the first and last loss."""
    torch.manual_seed(0)
    model = timm.create_model("nepa_sequence_tiny", input_dim=8, embed_dim=64, depth=2, num_heads=2)

    def probe():
        with torch.no_grad():
            features = model(rows)[:, 1:].mean(dim=1).numpy()
        fitted = LogisticRegression(max_iter=3000).fit(features[:1400], labels[:1400])
        return 100 * fitted.score(features[1400:], labels[1400:])

    untrained = probe()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.05)
    cycle = {"total_steps": 200, "pct_start": 0.1, "cycle_momentum": False}
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, **cycle)
    losses = []
    for _ in range(200):
        loss = NextEmbeddingLoss()(*model.predict_next(rows[torch.randint(1400, (64,))]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    trained = probe()
    print(f"rows: linear probe {untrained:.1f} to {trained:.1f}, loss {losses[0]:.2f} to {losses[-1]:.2f}")
    return untrained, trained, losses[0], losses[-1]


def test_digits_as_rows_of_pixels_are_learned_where_they_differ():
    """Standardised place by place, eight rows of eight pixels are learned; not if all look alike, as docs/sequences.md
    says."""
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)
    by_place = (pixels - pixels[:1400].mean(dim=0)) / (pixels[:1400].std(dim=0) + 0.1)
    untrained, trained, first, last = rows_learned(by_place, digits.target)
    assert trained > untrained + 6 and last < first - 0.2
    alike = rows_learned(pixels / 8 + 2, digits.target)
    assert alike[3] < -0.97 and alike[1] < alike[0] + 3
