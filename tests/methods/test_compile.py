"""The cost of a step that must not come back: recompilations, T x T buffers, waits for the device."""

import copy
import os
import subprocess
import sys
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from every_method import METHODS
from PIL import Image
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nepa_plugin import methods
from nepa_plugin.data.digits import digit_images
from nepa_plugin.loss import NextEmbeddingLoss
from nepa_plugin.methods import NEPA
from nepa_plugin.training.cli import main
from nepa_plugin.training.configs import read_config
from nepa_plugin.training.curves import read_metrics

CONFIGS = Path(__file__).parents[2] / "lightly_configs"
NAMES = METHODS
SIZE = {"embed_dim": 64, "depth": 3, "num_heads": 2}


def build(name, **kwargs):
    """A method as its digits config has it."""
    model = read_config(CONFIGS / f"{name}_digits.yaml")["model"]
    cls = getattr(methods, model["class_path"].rsplit(".", 1)[1])
    torch.manual_seed(0)
    return cls(**(model["init_args"] | {"batch_size_per_device": 4, "num_classes": 10} | kwargs))


def views_of(method, images=4):
    transform = method.train_transform()
    samples = [transform(Image.fromarray(image)) for image in map(np_image, range(images))]
    return [torch.stack(view) for view in zip(*samples, strict=True)]


def np_image(index):
    return np.asarray(digit_images(32)[0][index].convert("RGB"))


def nepa(**kwargs):
    torch.manual_seed(0)
    args = {"backbone": "nepa_vit_tiny_patch14_224", "img_size": 32, "patch_size": 4, "backbone_args": SIZE}
    return NEPA(**(args | {"batch_size_per_device": 4, "num_classes": 10} | kwargs))


@pytest.fixture(autouse=True)
def _fresh():
    """Counters and caches of torch.compile as in a new process."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def step(method, views, seed):
    torch.manual_seed(seed)
    method.zero_grad()
    loss, _ = method.step(views)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


# -- torch.compile -----------------------------------------------------------------------------------------------------


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.2])
def test_nepa_compiles_once(drop_path_rate):
    """Neither depth nor RoPE's random rescaling, a new batch or accumulated gradients cost another compilation."""
    method = nepa(drop_path_rate=drop_path_rate)
    method.compile_step("eager")
    views = views_of(method)
    step(method, views, 0)
    # one graph for all equal blocks, or one for every rate of stochastic depth; and the loss
    assert graphs() == (1 if drop_path_rate == 0 else SIZE["depth"]) + 1
    assert not counters["graph_break"]
    before = graphs()
    for seed in range(1, 6):
        step(method, [view.flip(0) + seed for view in views], seed)
    assert graphs() == before and not counters["recompile_limit"]


def test_more_rates_of_stochastic_depth_than_dynamo_would_keep():
    method = nepa(drop_path_rate=0.2, backbone_args=SIZE | {"depth": 12})
    method.compile_step("eager")
    views = views_of(method)
    for seed in range(2):
        step(method, views, seed)
    assert graphs() == 13  # dynamo gives up after 8 by default, and the other blocks would run uncompiled


def test_compiled_is_the_same_step():
    eager = nepa()
    compiled = copy.deepcopy(eager)
    compiled.compile_step("aot_eager")
    views = views_of(eager)
    expected, actual = step(eager, views, 3), step(compiled, views, 3)
    assert graphs() == 2  # it was compiled
    assert actual[0] == pytest.approx(expected[0], abs=1e-6)
    assert actual[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(actual[1][name], grad, rtol=1e-4, atol=1e-7)
    assert compiled.state_dict().keys() == eager.state_dict().keys()


def test_a_copy_is_not_compiled():
    """The moving average and the count of operations take copies of the method."""
    method = nepa()
    method.compile_step("eager")
    step(copy.deepcopy(method), views_of(method), 0)
    assert graphs() == 0


def test_validation_is_not_compiled():
    method = nepa()
    method.compile_step("eager")
    step(method, views_of(method), 0)
    before = graphs()
    method.log_dict = lambda *args, **kwargs: None
    for size in (4, 3):
        method.eval().validation_step((torch.rand(size, 3, 32, 32), torch.zeros(size, dtype=torch.long), []), 0)
    assert graphs() == before


@pytest.mark.parametrize("name", NAMES[1:])
def test_every_method_compiles(name):
    method = build(name)
    method.compile_step("eager")
    views = views_of(method)
    losses = [step(method, views, seed)[0] for seed in range(3)]
    assert graphs() > 0 and all(map(torch.isfinite, map(torch.tensor, losses)))
    before = graphs()
    for seed in range(3, 6):
        step(method, views, seed)
    assert graphs() == before and not counters["recompile_limit"]


class Stop(Exception):
    pass


def pretrain(folder, *more):
    """The arguments of a small compiled run of the demo: twenty steps in two epochs, with validation."""
    size = [f"--model.init_args.backbone_args.{key}={value}" for key, value in SIZE.items()]
    quiet = ["--trainer.enable_model_summary", "false", "--trainer.log_every_n_steps", "1"]
    options = ["--compile", "true", *size, *quiet, "--trainer.max_epochs", "2", "--run_dir", str(folder), *more]
    return ["--config", str(CONFIGS / "nepa_demo.yaml"), *options]


@pytest.mark.slow
def test_the_option_trains_in_one_process_and_in_two(tmp_path):
    """A real compiler, validation, moving average; two processes equal one."""
    main(pretrain(tmp_path / "one"), CONFIGS / "base.yaml")
    # the check of the compiler, the blocks and the loss; epochs, validation and the moving average add none
    assert graphs() == 3
    several = ["--trainer.devices", "2", "--trainer.accelerator", "cpu", "--data.batch_size_per_device", "64"]
    result = subprocess.run(
        [sys.executable, str(CONFIGS.parent / "tools" / "pretrain.py"), *pretrain(tmp_path / "two", *several)],
        env=dict(os.environ, PYTHONPATH=str(CONFIGS.parent), OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    one, two = (read_metrics(tmp_path / name / "metrics.csv")["train_loss"] for name in ("one", "two"))
    assert [step for step, _ in one] == [step for step, _ in two] == list(range(20))
    assert max(abs(a - b) for (_, a), (_, b) in zip(one, two, strict=True)) < 1e-5


@pytest.mark.slow
def test_a_compiled_run_resumes_exactly(tmp_path, monkeypatch):
    """With a backend that compiles in a second; what is restored does not depend on it."""
    monkeypatch.setattr(NEPA, "compile_step", partialmethod(NEPA.compile_step, "aot_eager"))
    main(pretrain(tmp_path / "unbroken"), CONFIGS / "base.yaml")
    assert graphs() == 3

    def stop_at_15(self, batch, batch_idx):
        if self.trainer.global_step == 15:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(NEPA, "on_train_batch_start", stop_at_15)
        with pytest.raises(Stop):
            main(pretrain(tmp_path / "resumed", "--checkpoint_every_n_steps", "13"), CONFIGS / "base.yaml")
    main(pretrain(tmp_path / "resumed", "--ckpt_path", "last"), CONFIGS / "base.yaml")
    curves = [read_metrics(tmp_path / name / "metrics.csv")["train_loss"] for name in ("unbroken", "resumed")]
    assert curves[0] == curves[1] and len(curves[0]) == 20
    weights = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("unbroken", "resumed")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_a_machine_without_a_compiler(tmp_path, monkeypatch, capsys):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("no g++ found")

    monkeypatch.setattr(torch, "compile", no_compiler)
    options = ["--compile", "true", "--run_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        main(["--config", str(CONFIGS / "nepa_demo.yaml"), *options], CONFIGS / "base.yaml")
    error = capsys.readouterr().err
    assert "no g++ found" in error and "leave out --compile" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


# -- memory and kernels ------------------------------------------------------------------------------------------------


class Record(TorchDispatchMode):
    """Keeps the names of all operators and the shapes of all tensors that they return."""

    def __init__(self):
        super().__init__()
        self.shapes, self.names = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        self.names.add(str(func))
        self.shapes |= {tuple(t.shape) for t in tree_leaves(outputs) if isinstance(t, torch.Tensor)}
        return outputs


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_attention_is_fused(attention, precision):
    """No T x T buffer exists in forward or backward pass, and no mask is built."""
    # no width of the network may be a number of tokens
    method = nepa(attention=attention, backbone_args=SIZE | {"embed_dim": 96})
    views = views_of(method)
    tokens = 1 + (32 // 4) ** 2
    with Record() as record:
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = method.step(views)[0]
        loss.backward()
    square = [shape for shape in record.shapes if sum(n in (tokens, tokens - 1) for n in shape) > 1]
    assert square == []
    fused = {name for name in record.names if "attention" in name}
    assert {name.split(".")[1] for name in fused} == {
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    }
    assert not any("softmax" in name for name in record.names)


def test_the_record_finds_a_square_buffer():
    method = nepa()
    for block in method.backbone.blocks:
        block.attn.fused_attn = False
    with Record() as record:
        method.step(views_of(method))
    assert any(shape[-2:] == (65, 65) for shape in record.shapes)


def test_the_loss_keeps_nothing_as_large_as_its_inputs():
    """Normalising both sides would save two more (B, T, D) tensors for the backward pass."""
    embeddings, predictions = torch.rand(2, 9, 16), torch.rand(2, 9, 16, requires_grad=True)
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        NextEmbeddingLoss()(embeddings, predictions)
    inputs = {t.untyped_storage().data_ptr() for t in (embeddings, predictions)}
    assert sum(size for pointer, size in saved.items() if pointer not in inputs) < embeddings.nbytes


@pytest.mark.parametrize("name", [name for name in NAMES if name != "aim"])
def test_gradient_checkpointing(name):
    """The same gradients, from blocks that run a second time in the backward pass."""
    calls = []
    results = []
    for grad_checkpointing in (False, True):
        method = build(name, grad_checkpointing=grad_checkpointing)
        calls.append(0)

        def count(*_):
            calls[-1] += 1

        for block in method.backbone.blocks:
            block.register_forward_pre_hook(count)
        results.append(step(method.train(), views_of(method), 5))
    assert calls[1] == 2 * calls[0]
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    for key, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][key], grad, rtol=1e-4, atol=1e-6)


def test_aim_cannot_checkpoint():
    """timm's ViT does not under an attention mask, and would say nothing."""
    with pytest.raises(ValueError, match="grad_checkpointing"):
        build("aim", grad_checkpointing=True)
