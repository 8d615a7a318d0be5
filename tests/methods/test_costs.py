"""What a step of every method costs, by hand, at the size of the digits' configs."""

import itertools
from pathlib import Path

import pytest

from nepa_plugin import methods
from nepa_plugin.methods.cost import training_cost
from nepa_plugin.training.configs import read_config

CONFIGS = Path(__file__).parents[2] / "lightly_configs"

D, DEPTH, PATCHES, PIXELS = 64, 4, 8 * 8, 3 * 4 * 4
BATCH = 4  # of the counted step
HIDDEN, OUT, PROTOTYPES = 256, 64, 256


def blocks(tokens, depth=DEPTH):
    """Operations of a forward pass: per token and block 12 D^2 weights, and two T x T products over all heads."""
    return depth * (tokens * 2 * 12 * D * D + 2 * 2 * tokens * tokens * D)


def embedding(patches=PATCHES):
    return 2 * patches * PIXELS * D


def layers(*widths):
    """Operations, per row, of linear layers one after the other."""
    return sum(2 * a * b for a, b in itertools.pairwise(widths))


def training(tokens=1 + PATCHES, patches=PATCHES):
    """An encoder's forward and backward pass, which is twice as much but for the pixels, whose gradient nobody asks."""
    return 3 * blocks(tokens) + 2 * embedding(patches)


def momentum(tokens=1 + PATCHES):
    return blocks(tokens) + embedding()


WHOLE_VIEW, LOCAL_VIEW = training(), training(1 + 4 * 4, 4 * 4)
PROTOTYPE_HEAD = layers(D, HIDDEN, HIDDEN, OUT, PROTOTYPES)
#: Every pair of a teacher's view and a student's, forward and backward for the student.
DINO_LOSS = 2 * 2 * 2 * 4 * PROTOTYPES
DINO = 2 * (momentum() + PROTOTYPE_HEAD) + 2 * (WHOLE_VIEW + LOCAL_VIEW) + 4 * 3 * PROTOTYPE_HEAD + DINO_LOSS
#: Method -> operations per image, but for the patches that I-JEPA, AIM and iBOT draw.
OPERATIONS = {
    "nepa": WHOLE_VIEW,
    # both views of all images with both
    "simclr": 2 * (WHOLE_VIEW + 3 * layers(D, HIDDEN, OUT)) + 3 * 4 * 2 * BATCH * OUT,
    # a view's predictions with the keys of the other view, which get no gradient
    "mocov3": 2 * (WHOLE_VIEW + momentum() + 4 * layers(D, HIDDEN, HIDDEN, OUT) + 3 * layers(OUT, HIDDEN, OUT))
    + 2 * 2 * 2 * BATCH * OUT,
    "simsiam": 2 * (WHOLE_VIEW + 3 * layers(D, HIDDEN, HIDDEN, 256) + 3 * layers(256, 64, 256)),
    "byol": 2 * (WHOLE_VIEW + momentum() + 4 * layers(D, HIDDEN, OUT) + 3 * layers(OUT, HIDDEN, OUT)),
    "dino": DINO,
    # 256 directions, which get no gradient
    "lejepa": 2 * (WHOLE_VIEW + LOCAL_VIEW) + 4 * (3 * layers(D, HIDDEN, HIDDEN, 32) + 2 * layers(32, 256)),
    # a quarter of the patches is seen; the decoder, of two blocks, has all tokens and predicts the others
    "mae": 3 * (blocks(1 + 16) + layers(D, D) * (1 + 16) + blocks(1 + PATCHES, 2) + layers(D, PIXELS) * 48)
    + 2 * embedding(),
    "aim": WHOLE_VIEW,
    "beit": WHOLE_VIEW,
    # the colours of 2x2 pixels in each patch, and the nearest of 32 for each
    "igpt": WHOLE_VIEW + PATCHES * (3 * layers(D, 4 * 32) + 4 * layers(3, 32)),
    # five patches ahead, each found among 255
    "cpc": WHOLE_VIEW
    + PATCHES * 3 * layers(D, 5 * D)
    + sum(PATCHES - ahead for ahead in range(1, 6)) * 3 * layers(D, 255),
    "ibot": DINO,
}
#: Method -> parts of the network beside the backbone that are trained and thrown away, and their parameters.
NORM = 2  # scale and shift per channel
DISCARDED = {
    "nepa": (set(), 0),
    "simclr": ({"projection_head"}, D * 256 + NORM * 256 + 256 * 64 + NORM * 64),
    "mocov3": (
        {"projection_head", "prediction_head"},
        D * 256 + 256 * 256 + 256 * 64 + NORM * (256 + 256 + 64) + 64 * 256 + 256 * 64 + NORM * (256 + 64),
    ),
    "simsiam": (
        {"projection_head", "prediction_head"},
        D * 256 + 256 * 256 + 256 * 256 + NORM * (256 + 256) + 256 * 64 + NORM * 64 + 64 * 256 + 256,
    ),
    "byol": (
        {"projection_head", "prediction_head"},
        D * 256 + NORM * 256 + 256 * 64 + 64 + 64 * 256 + NORM * 256 + 256 * 64 + 64,
    ),
    "dino": ({"head"}, (D + 1) * 256 + 257 * 256 + 257 * 64 + 64 * 256),  # the prototypes' lengths stay
    "lejepa": ({"projection_head"}, D * 256 + 256 * 256 + NORM * (256 + 256) + 257 * 32),
    "mae": (
        {"decoder_embed", "decoder", "decoder_pred"},
        65 * 64 + 64 + 2 * (12 * D * D + 13 * D) + NORM * D + 65 * PIXELS,
    ),
    "ijepa": ({"predictor"}, 2 * 65 * 64 + 64 + 2 * (12 * D * D + 13 * D) + NORM * D),
    "aim": ({"head"}, D * 128 + 2 * (NORM * 128 + 2 * 128 * 512) + NORM * 128 + 128 * PIXELS),
    "beit": ({"head", "mask_token"}, (D + 1) * 256 + D),
    "igpt": ({"head"}, (D + 1) * 4 * 32),
    "cpc": ({"predictors"}, D * 5 * D),
    "ibot": ({"head", "mask_token"}, (D + 1) * 256 + 257 * 256 + 257 * 64 + 64 * 256 + D),
}
#: Method -> views, passes through an encoder, and tokens in these.
PASSES = {
    "nepa": (1, 1, 65),
    "simclr": (2, 2, 2 * 65),
    "mocov3": (2, 4, 4 * 65),
    "simsiam": (2, 2, 2 * 65),
    "byol": (2, 4, 4 * 65),
    "dino": (4, 6, 4 * 65 + 2 * 17),
    "lejepa": (4, 4, 2 * 65 + 2 * 17),
    "mae": (1, 1, 17),
    "ijepa": (1, 2, 65),  # and the context
    "aim": (1, 1, 65),
    "beit": (1, 1, 65),
    "igpt": (1, 1, 65),
    "cpc": (1, 1, 65),
    "ibot": (4, 6, 4 * 65 + 2 * 17),
}


def built(name):
    """A method as its digits config has it, with random weights."""
    model = read_config(CONFIGS / f"{name}_digits.yaml")["model"]
    cls = getattr(methods, model["class_path"].rsplit(".", 1)[1])
    return cls(batch_size_per_device=64, num_classes=10, **model["init_args"])


def drawing(method):
    """Return the list of the masks that the method's step draws from now on, copies of the method included."""
    drawn, draw = [], method.masks
    if draw is not None:
        method.masks = lambda batch_size: drawn.append(draw(batch_size)) or drawn[-1]
    return drawn


@pytest.mark.parametrize("small", [True, False], ids=["computed", "valueless"])
@pytest.mark.parametrize("name", DISCARDED)
def test_cost(name, small, monkeypatch):
    if not small:
        monkeypatch.setattr("nepa_plugin.methods.cost.SMALL", 0)
    method = built(name)
    drawn = drawing(method)
    cost = training_cost(method, BATCH)
    views, passes, tokens = PASSES[name]
    if name == "ijepa":  # the encoder sees the context, and the predictor that and one target after the other
        ((context, targets),) = drawn
        seen, predicted = context.shape[1], [targets.shape[2]] * targets.shape[1]
        tokens += 1 + seen
        predictor = layers(D, D) * seen + sum(blocks(seen + n, 2) + layers(D, D) * n for n in predicted)
        operations = momentum() + training(1 + seen) + 3 * predictor
    else:
        operations = OPERATIONS[name]
    if name == "aim":  # the head predicts the patches after the prefix
        operations += 3 * layers(D, 128, 512, 128, 512, 128, PIXELS) * drawn[0][0].sum().item() / BATCH
    if name == "beit":  # the masked patches: their ids, and their ids' prediction
        operations += (layers(PIXELS, 256) + 3 * layers(D, 256)) * drawn[0][0].sum().item() / BATCH
    if name == "ibot":  # the teacher's head and the student's see the masked patches, too
        operations += 4 * PROTOTYPE_HEAD * drawn[0][0].sum().item() / BATCH
    assert cost.gflops * 1e9 == pytest.approx(operations, rel=1e-9)
    assert (cost.views, cost.encoder_passes, cost.encoder_tokens) == (views, passes, tokens)
    parts = {key.split(".")[0] for key, _ in method._own_parameters()} - {"backbone"}
    assert (parts, cost.discarded_parameters) == DISCARDED[name]
    assert cost.backbone_parameters == sum(p.numel() for p in method.backbone.parameters())
