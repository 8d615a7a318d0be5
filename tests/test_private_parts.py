"""Every private part of another package that docs/private_parts.md lists is there, and every one used is listed."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from imports import PACKAGE, modules

PAGE = Path(__file__).parents[1] / "docs" / "private_parts.md"
ROWS = re.findall(r"^\| `([\w.]+)` \| (`[^|]+`) \| \S.* \|$", PAGE.read_text(), re.MULTILINE)
#: Part -> the files that use it.
PARTS = {part: re.findall(r"`([\w/]+\.py)`", files) for part, files in ROWS}

#: What their callers pass, and what an override takes: self is left out.
ARGUMENTS = {
    "timm.models._hub.save_config_for_hf": ["model", "config_path"],
    "timm.models._input.update_model_args": ["model"],
    "timm.models._manipulate.checkpoint": ["function"],
    "timm.layers.RotaryEmbeddingDinoV3._create_embed": ["feat_shape", "no_aug"],
    "timm.layers.RotaryEmbeddingDinoV3._get_pos_embed_from_coords": ["coords"],
    "timm.models.eva.Eva._init_weights": ["m", "needs_reset"],
    "pytorch_lightning.trainer.connectors.signal_connector._SignalConnector._sigterm_notifier_fn": ["signum", "_"],
    "pytorch_lightning.loops.training_epoch_loop._TrainingEpochLoop._broadcast_sigterm_tensor": [],
    "pytorch_lightning.loops.fit_loop._FitLoop._should_accumulate": [],
    "pytorch_lightning.callbacks.ModelCheckpoint._monitor_candidates": ["trainer"],
    "pytorch_lightning.callbacks.ModelCheckpoint._save_topk_checkpoint": ["trainer", "monitor_candidates"],
    "pytorch_lightning.callbacks.ModelCheckpoint._save_checkpoint": ["trainer", "filepath"],
    "pytorch_lightning.callbacks.WeightAveraging._swap_models": ["pl_module"],
    "pytorch_lightning.callbacks.WeightAveraging._copy_average_to_current": ["pl_module"],
    "pytorch_lightning.loggers.csv_logs.ExperimentWriter._rewrite_with_new_header": ["fieldnames"],
    "pytorch_lightning.cli.LightningCLI._get": ["config", "key"],
    "lightly.data.ijepa_collate.IJEPAMaskCollator._sample_block_size": ["generator", "scale", "aspect_ratio_scale"],
}


def instance(cls, tmp_path):
    """Return an object whose attributes are those of a run."""
    name = cls.__name__
    if name == "LRScheduler":
        return torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), lambda _: 1.0)
    if name == "OptimWrapper":
        return cls(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))
    if name == "Runner":
        from mmengine.model import BaseModel

        class Model(BaseModel):
            def forward(self, inputs, data_samples=None, mode="tensor"):
                raise NotImplementedError

        return cls(Model(), str(tmp_path), experiment_name=tmp_path.name)
    arguments = {
        "CSVLogger": (tmp_path,),
        "IJEPAMaskCollator": (32, 8),
    }
    keywords = {
        "BaseDataset": {"lazy_init": True},
        "Trainer": {"logger": False, "accelerator": "cpu", "enable_checkpointing": False},
    }
    if name == "_SignalConnector":
        return instance(resolve_name("pytorch_lightning.Trainer"), tmp_path)._signal_connector
    return cls(*arguments.get(name, ()), **keywords.get(name, {}))


def found(part, tmp_path):
    """Return the part: of a module, of a class, or of an instance where ``__init__`` sets it."""
    try:
        return resolve_name(part)
    except AttributeError:
        owner, _, name = part.rpartition(".")
        cls = resolve_name(owner)
        if not inspect.isclass(cls):
            raise
        return getattr(instance(cls, tmp_path), name)


@pytest.mark.parametrize("part", PARTS)
def test_part_is_there(part, tmp_path):
    package = part.split(".")[0]
    if package in ("mmengine", "mmcv"):
        pytest.importorskip("mmengine")
        importlib.import_module("nepa_plugin.segmentation")  # puts a stand-in at mmcv._ext where there is none
        importlib.import_module("mmcv.ops")
    value = found(part, tmp_path)
    if part in ARGUMENTS:
        own = [name for name in inspect.signature(value).parameters if name != "self"]
        assert own[: len(ARGUMENTS[part])] == ARGUMENTS[part]
    if part == "mmcv._ext":
        assert resolve_name("mmcv.ops.nms").ext_module is value


def test_each_function_has_its_arguments_checked():
    assert set(ARGUMENTS) <= set(PARTS)


# -- the list ----------------------------------------------------------------------------------------------------------


def private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def listed():
    """Return (file, private name) of each part, for every private name in its path."""
    names = {(file, name) for part, files in PARTS.items() for file in files for name in part.split(".")}
    return {(file, name) for file, name in names if private(name)}


def trees():
    return {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def used():
    """Return (file, name) of the private names that the package uses and does not define, and of what it overrides."""
    own, seen = {"_asdict", "_exit"}, set()  # namedtuple's and os's are public
    for file, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute):
                of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
                if of_self and isinstance(node.ctx, ast.Store):
                    own.add(node.attr)
                seen.add((file, node.attr))
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
                own |= {target.id for target in targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.ImportFrom):
                seen |= {(file, name) for name in (node.module or "").split(".")}
                if not (node.module or "").startswith("nepa_plugin"):
                    seen |= {(file, alias.name) for alias in node.names}
    return {(file, name) for file, name in seen if private(name) and name not in own} | overridden()


def overridden():
    found = set()
    for name in modules():
        module = importlib.import_module(name)
        for cls in vars(module).values():
            if not inspect.isclass(cls) or cls.__module__ != name:
                continue
            others = [base for base in cls.__mro__[1:] if not base.__module__.startswith("nepa_plugin")]
            names = {key for key in vars(cls) if private(key) and any(key in vars(base) for base in others)}
            file = str(Path(inspect.getfile(module)).relative_to(PACKAGE))
            found |= {(file, key) for key in names - {"_abc_impl"}}
    return found


def test_every_part_that_is_used_is_listed():
    pytest.importorskip("mmengine")
    assert used() - listed() == set()


@pytest.mark.parametrize("part", PARTS)
def test_a_listed_part_is_used_where_the_page_says(part):
    *_, name = part.split(".")
    for file in PARTS[part]:
        text = (PACKAGE / file).read_text()
        assert re.search(rf"(?<!\w){name}(?!\w)", text), f"{file} does not use {part}"


def test_every_line_of_the_page_is_read():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert len(lines) == len(ROWS) == len(PARTS)
