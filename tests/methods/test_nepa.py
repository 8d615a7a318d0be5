"""The NEPA method: its optimizer, and the signatures of its ablations on real images."""

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nepa_plugin
from nepa_plugin.data import evaluation_loaders
from nepa_plugin.evaluation import extract_depth_features, logistic_probe
from nepa_plugin.methods import NEPA
from nepa_plugin.training.cli import main

CONFIGS = Path(__file__).parents[2] / "lightly_configs"
SIZE = {"embed_dim": 64, "depth": 2, "num_heads": 2}


def nepa(**kwargs):
    torch.manual_seed(0)
    args = {"backbone": "nepa_vit_tiny_patch14_224", "img_size": 16, "patch_size": 4, "backbone_args": SIZE}
    return NEPA(**(args | {"num_classes": 3} | kwargs))


# -- the predictor head ------------------------------------------------------------------------------------------------


def test_without_a_head_nothing_is_added():
    model = nepa()
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "online_classifier"}


@pytest.mark.parametrize(
    ("kind", "parameters"), [("mlp", 3 * 65 * 64 + 2 * 128), ("simsiam", 64 * 16 + 2 * 16 + 17 * 64)]
)
def test_a_head_is_between_the_outputs_and_the_loss_and_not_exported(kind, parameters, tmp_path):
    model = nepa(predictor_head=kind).eval()  # in training, positions are rescaled at random
    assert sum(p.numel() for p in model.heads.parameters()) == parameters
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    loss, features = model.step([images])
    embeddings, outputs = model.backbone.predict_next(images)
    predictions = outputs.reshape(-1, 64)
    for layer in (*model.heads.hidden, model.heads.places[0]):
        predictions = layer(predictions)
    predictions = predictions.view(4, 17, 64)
    targets = embeddings[:, 1:].detach()
    cosine = (predictions[:, :-1] * targets).sum(-1) / (predictions[:, :-1].norm(dim=-1) * targets.norm(dim=-1))
    torch.testing.assert_close(loss, -cosine.mean())
    torch.testing.assert_close(features, outputs[:, 1:].mean(dim=1))
    named = dict(model.backbone.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    expected = torch.autograd.grad(-cosine.mean(), list(named.values()), allow_unused=True)
    assert sum(gradient is not None for gradient in found) > 10
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other)
    nepa_plugin.save_backbone(model.backbone, tmp_path)
    assert not any("head" in key for key in nepa_plugin.load_backbone(tmp_path).state_dict())


def test_an_unknown_head_is_refused():
    with pytest.raises(ValueError, match="predictor_head='linear' is none of none, mlp and simsiam"):
        nepa(predictor_head="linear")


# -- several places ahead, contrast, and the class token ---------------------------------------------------------------


@pytest.mark.parametrize("head", ["none", "mlp"])
@pytest.mark.parametrize("loss", ["cosine", "infonce"])
@pytest.mark.parametrize("class_token_target", [True, False])
def test_the_loss_is_the_mean_over_the_places_ahead(head, loss, class_token_target):
    model = nepa(predictor_head=head, horizon=3, loss=loss, temperature=0.5, class_token_target=class_token_target)
    model.eval()  # in training, positions are rescaled at random
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    value, features = model.step([images])
    embeddings, outputs = model.backbone.predict_next(images)
    start = 0 if class_token_target else 1
    terms = []
    for k, layer in enumerate(model.heads.places, start=1):
        assert isinstance(layer, torch.nn.Identity) == (head == "none" and k == 1)
        predicted, targets = layer(model.heads.hidden(outputs[:, start:]))[:, :-k], embeddings[:, start + k :].detach()
        cosines = torch.nn.functional.cosine_similarity(predicted[:, :, None], targets[:, None], dim=-1)
        if loss == "cosine":
            terms.append(-cosines.diagonal(dim1=1, dim2=2).mean())
        else:
            terms.append(-(cosines / 0.5).log_softmax(dim=2).diagonal(dim1=1, dim2=2).mean())
    torch.testing.assert_close(value, torch.stack(terms).mean())
    torch.testing.assert_close(features, outputs[:, 1:].mean(dim=1))


def test_places_ahead_can_weigh_differently():
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    losses = {}
    for weights in (None, [1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [3.0, 1.0]):
        torch.manual_seed(0)
        losses[str(weights)] = nepa(horizon=2, horizon_weights=weights).eval().step([images])[0].detach()
    assert torch.equal(losses["None"], losses["[1.0, 1.0]"])
    torch.manual_seed(0)
    torch.testing.assert_close(losses["[1.0, 0.0]"], nepa().eval().step([images])[0].detach())
    expected = 0.75 * losses["[1.0, 0.0]"] + 0.25 * losses["[0.0, 1.0]"]
    torch.testing.assert_close(losses["[3.0, 1.0]"], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 17}, "horizon=17 must be less than the 17 tokens"),
        ({"horizon": 16, "class_token_target": False}, "horizon=16 must be less than the 16 tokens"),
        ({"horizon": 2, "shift": False}, "horizon=2 needs shift"),
        ({"horizon": 2, "horizon_weights": [1.0]}, r"horizon_weights=\[1.0\] must be 2 number\(s\), not all of them 0"),
        ({"horizon": 2, "horizon_weights": [0.0, 0.0]}, "not all of them 0"),
        ({"horizon": 2, "horizon_weights": [1.0, -1.0]}, r"horizon_weights\[1\] must be at least 0, got -1.0"),
        ({"loss": "mse"}, "loss='mse' is neither 'cosine' nor 'infonce'"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        nepa(**options)


def test_masked_inputs_have_clean_targets_and_a_token_of_their_own():
    model = nepa(input_mask_ratio=0.4).eval()
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    (masked,) = model.masks(4)
    assert masked.shape == (4, 16) and (masked.sum(dim=1) == 6).all() and not torch.equal(masked[0], masked[1])
    loss, _ = model.step([images], [masked])
    hidden = torch.cat([torch.zeros(4, 1, dtype=torch.bool), masked], dim=1)
    clean = model.backbone.embed(images)
    x = torch.where(hidden[:, :, None], model.mask_token, clean)
    for block in model.backbone.blocks:
        x = block(x, rope=model.backbone.rope.get_embed(), is_causal=True)
    cosine = torch.nn.functional.cosine_similarity(model.backbone.norm(x)[:, :-1], clean[:, 1:].detach(), dim=-1)
    torch.testing.assert_close(loss, -cosine.mean())
    assert nepa().mask_token is None and nepa().masks is None
    with pytest.raises(ValueError, match=r"input_mask_ratio=0.01 masks none"):
        nepa(input_mask_ratio=0.01)


# -- the copy baseline and the skill -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "skill"), [(0.0, 0.0), (1.0, 1.0), (0.5, None)])
def test_skill_is_zero_for_copying_and_one_for_a_perfect_prediction(share, skill, monkeypatch):
    model, logged = nepa(), {}
    embeddings = torch.randn(4, 17, 64, generator=torch.Generator().manual_seed(1))
    following = torch.cat([embeddings[:, 1:], embeddings[:, :1]], dim=1)
    predictions = (1 - share) * embeddings + share * following
    monkeypatch.setattr(model.backbone, "predict_next", lambda images: (embeddings, predictions))
    monkeypatch.setattr(type(model), "is_logging_step", True)
    monkeypatch.setattr(model, "log", lambda name, value: logged.__setitem__(name, float(value)))
    loss, _ = model.step([torch.zeros(4, 3, 16, 16)])
    cosine = torch.nn.functional.cosine_similarity(embeddings[:, :-1], embeddings[:, 1:], dim=-1)
    assert logged["copy_baseline"] == pytest.approx(-cosine.mean().item(), abs=1e-6)
    expected = (loss.item() + cosine.mean().item()) / (-1 + cosine.mean().item()) if skill is None else skill
    assert logged["skill"] == pytest.approx(expected, abs=1e-5)


# -- optimizer ---------------------------------------------------------------------------------------------------------


def optimizer_of(model, world_size=1, accumulate=1, steps=100):
    model._trainer = SimpleNamespace(
        world_size=world_size, accumulate_grad_batches=accumulate, estimated_stepping_batches=steps
    )
    (optimizer,), (schedule,) = model.configure_optimizers()
    return optimizer, schedule


def test_weight_decay_groups():
    model = nepa(weight_decay=0.07)
    groups = {group["name"]: group for group in optimizer_of(model)[0].param_groups}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "decay": 0.07,
        "no_decay": 0.0,
        "online_classifier": 0.0,
    }
    group_of = {id(p): name for name, group in groups.items() for p in group["params"]}
    names = {name: group_of.pop(id(p)) for name, p in model.named_parameters() if p.requires_grad}
    assert not group_of  # every parameter once, and no other
    for name, parameter in model.named_parameters():
        if name.startswith("online_classifier."):
            assert names[name] == "online_classifier"
        elif name in names:
            plain = parameter.ndim < 2 or name.endswith("bias")
            assert names[name] == ("no_decay" if plain else "decay"), name
    assert names["backbone.patch_embed.proj.weight"] == "decay"
    assert names["backbone.patch_embed.proj.bias"] == "no_decay"


def test_the_learning_rate_follows_the_global_batch():
    optimizer, schedule = optimizer_of(nepa(batch_size_per_device=32, base_lr=1e-3), world_size=4, accumulate=3)
    assert all(group["initial_lr"] == pytest.approx(1e-3 * 32 * 4 * 3 / 256) for group in optimizer.param_groups)
    assert schedule["interval"] == "step"


def test_the_learning_rate_warms_up_and_ends_at_zero():
    optimizer, schedule = optimizer_of(nepa(batch_size_per_device=256, base_lr=1e-3, warmup_fraction=0.1), steps=50)
    rates = []
    for _ in range(50):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule["scheduler"].step()
    assert rates[:5] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    assert rates[5:] == sorted(rates[5:], reverse=True) and max(rates) == pytest.approx(1e-3)
    assert rates[-1] < 1e-5


def test_the_probe_does_not_count_when_clipping():
    clipped = []
    for factor in (1.0, 1e6):
        model = nepa(clip_grad_norm=0.01)
        loss, features = model.step([torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))])
        probe = model.online_classifier.training_step((features.detach(), torch.tensor([0, 1, 2, 0])), 0)[0]
        (loss + factor * probe).backward()
        raw = model.online_classifier.classification_head.weight.grad.clone()
        model.configure_gradient_clipping(None)
        assert torch.equal(raw, model.online_classifier.classification_head.weight.grad)
        clipped.append({n: p.grad for n, p in model.backbone.named_parameters() if p.grad is not None})
    assert clipped[0] and clipped[0].keys() == clipped[1].keys()
    assert all(torch.equal(grad, clipped[1][name]) for name, grad in clipped[0].items())
    assert torch.cat([g.flatten() for g in clipped[0].values()]).norm() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("num_classes", [0, 1])
def test_without_classes_there_is_no_probe(num_classes):
    model = nepa(num_classes=num_classes)
    assert model.online_classifier is None
    images, targets = torch.randn(4, 3, 16, 16), torch.zeros(4, dtype=torch.long)
    loss = model.training_step(([images], targets, ["a"] * 4), 0)
    loss.backward()
    assert loss.isfinite() and model.validation_step((images, targets, ["a"] * 4), 0) is None
    assert [group["name"] for group in optimizer_of(model)[0].param_groups] == ["decay", "no_decay"]


def test_starts_from_a_published_checkpoint():
    folder = CONFIGS.parent / "tests" / "data" / "nepa-toy-gelu"
    size = {"embed_dim": 64, "depth": 3, "num_heads": 2}
    weights = nepa(backbone_args=size, init_from=str(folder)).backbone.state_dict()
    reference = nepa_plugin.load_backbone(folder).state_dict()
    assert weights.keys() == reference.keys()
    assert all(torch.equal(weights[name], value) for name, value in reference.items())


def test_a_backbone_that_is_no_predictor_is_refused():
    with pytest.raises(ValueError, match="needs a nepa_vit_"):
        NEPA(backbone="vit_tiny_patch16_224", num_classes=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet18", "backbone_args": None}, "'resnet18' cannot be built with .*img_size.*timm Vision"),
        ({"backbone_args": {"depht": 3}}, "cannot be built with .*'depht'"),
        ({"backbone": "vit_nothing"}, "'vit_nothing' is not a timm model"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
    ],
)
def test_what_cannot_be_built_is_one_clear_error(options, message):
    with pytest.raises(ValueError, match=message):
        nepa(**options)


# -- ablations ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Returns a function from options to the folder of a run on the digits, each trained once."""
    done = {}

    def run(epochs, *options):
        if (epochs, options) not in done:
            folder = tmp_path_factory.mktemp("ablation") / "run"
            size = [part for key, value in SIZE.items() for part in (f"--model.backbone_args.{key}", str(value))]
            trainer = ["--trainer.max_epochs", str(epochs), "--trainer.log_every_n_steps", "1"]
            quiet = ["--trainer.check_val_every_n_epoch", "1000", "--trainer.enable_model_summary", "false"]
            config = ["--config", str(CONFIGS / "nepa_demo.yaml"), "--run_dir", str(folder)]
            main([*config, *size, *trainer, *quiet, *options], CONFIGS / "base.yaml")
            done[epochs, options] = folder
        return done[epochs, options]

    return run


def curve(run_dir, name):
    with (run_dir / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def probe(model):
    """Accuracy in per cent of a logistic probe on the mean of the patch tokens after the last block."""
    depth = f"block {len(model.blocks)}"
    train, val = (extract_depth_features(model, loader) for loader in evaluation_loaders("digits", model))
    return logistic_probe(train.features[depth]["mean"], train.labels, val.features[depth]["mean"], val.labels)


@pytest.fixture(scope="module")
def default(train):
    return train(6)


@pytest.mark.slow
def test_without_the_shift_there_is_nothing_to_learn(train, default):
    """The loss is nearly -1 from the start, and the features stay about as good as an untrained network's."""
    no_shift = train(6, "--model.shift", "false")
    assert curve(no_shift, "train_loss")[-1] < -0.95
    assert curve(default, "train_loss")[-1] > -0.9
    backbone = nepa_plugin.load_backbone(default / "backbone")
    learned, copied = probe(backbone), probe(nepa_plugin.load_backbone(no_shift / "backbone"))
    torch.manual_seed(0)
    backbone.init_weights()
    untrained = probe(backbone)
    print(f"{untrained=:.1f} {copied=:.1f} {learned=:.1f}")
    assert copied < untrained + 8
    assert learned > untrained + 4 and learned > copied + 4


@pytest.mark.slow
def test_without_the_stop_gradient_the_embeddings_collapse(train, default):
    kept, collapsing = (
        curve(default, "embedding_cosine"),
        curve(train(3, "--model.stop_gradient", "false"), "embedding_cosine"),
    )
    assert collapsing[-1] > collapsing[0] + 0.1  # 0.06 -> 0.23 in 30 steps
    assert collapsing[-1] > kept[-1] + 0.1  # 0.05 after 60 steps
