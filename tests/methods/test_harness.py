"""Methods in lightly's own ViT benchmark harness, with nothing of this package around them but model and transform."""

import copy
import shutil
from typing import Any

import pytest
import torch
from lightly.data import LightlyDataset
from lightly.data.multi_view_collate import MultiViewCollate
from lightly.utils.benchmarking import FinetuneClassifier, KNNClassifier, LinearClassifier, MetricCallback
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.callbacks import EMAWeightAveraging, LearningRateMonitor
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from nepa_plugin.data import digits_folder, eval_transform
from nepa_plugin.methods import MAE, NEPA, SimCLR
from nepa_plugin.runtime.averaging import FusedEMA

pytestmark = pytest.mark.slow
QUIET = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Twenty training and ten validation images of each of three classes."""
    root = tmp_path_factory.mktemp("three")
    for split, count in (("train", 20), ("val", 10)):
        for label in ("0", "1", "2"):
            (root / split / label).mkdir(parents=True)
            for file in sorted((digits_folder() / split / label).iterdir())[:count]:
                shutil.copy(file, root / split / label)
    return root


def plain_loader(folder, shuffle=False):
    """Yields (images, targets, filenames)."""
    dataset = LightlyDataset(str(folder), transform=eval_transform(28))
    return DataLoader(dataset, batch_size=16, shuffle=shuffle, drop_last=shuffle)


#: Each method as a user of the harness makes it: the sizes of a small run, all else as it comes.
MODELS = {
    "nepa": lambda: NEPA(backbone="nepa_vit_tiny_patch14_224", **SIZES),
    "simclr": lambda: SimCLR(
        backbone="nepa_vit_tiny_patch14_224",
        freeze_patch_projection=False,  # fine-tuning, below, trains what pretraining left trainable
        pool="mean",  # after six steps the class token, behind LayerScale, is still nearly the same for all images
        **(SIZES | {"backbone_args": {"depth": 2, "attention": "bidirectional"}}),
    ),
    "mae": lambda: MAE(
        backbone="plain_vit_tiny_patch14_224", decoder_depth=2, decoder_dim=64, decoder_num_heads=2, **SIZES
    ),
}
SIZES = {"batch_size_per_device": 16, "num_classes": 3, "img_size": 28, "patch_size": 14, "backbone_args": {"depth": 2}}


@pytest.fixture(scope="module", params=MODELS)
def pretrained(request, folders, tmp_path_factory):
    seed_everything(0)
    model = MODELS[request.param]()
    before = copy.deepcopy(model.state_dict())
    dataset = LightlyDataset(str(folders / "train"), transform=model.train_transform())
    train = DataLoader(dataset, batch_size=16, shuffle=True, drop_last=True, collate_fn=MultiViewCollate())
    metrics = MetricCallback()
    trainer: Any = Trainer(
        max_epochs=2,
        callbacks=[LearningRateMonitor(), metrics],
        logger=TensorBoardLogger(str(tmp_path_factory.mktemp("logs")), name="pretrain"),
        log_every_n_steps=1,
        **QUIET,
    )
    trainer.fit(model, train_dataloaders=train, val_dataloaders=plain_loader(folders / "val"))
    decays = [callback.decay for callback in trainer.callbacks if isinstance(callback, FusedEMA)]
    assert decays == ([pytest.approx(1 / 6)] if request.param == "nepa" else [])  # the others have no moving average
    return model, trainer, metrics, before


def backbone_weights(model):
    return {name: weight.clone() for name, weight in model.backbone.state_dict().items()}


def changed(model, before):
    return {name for name, weight in model.backbone.state_dict().items() if not torch.equal(weight, before[name])}


def test_pretraining_logs_what_the_harness_reads(pretrained):
    model, trainer, metrics, before = pretrained
    assert trainer.global_step == 6  # 60 images are three batches of 16
    assert len(metrics.train_metrics["train_loss"]) == 2
    assert all(-1 <= loss < (1 if isinstance(model, NEPA) else 10) for loss in metrics.train_metrics["train_loss"])
    assert len(metrics.val_metrics["val_online_cls_top1"]) == 2
    assert all(0 <= top1 <= 1 for top1 in metrics.val_metrics["val_online_cls_top1"])
    assert "val_online_cls_top3" in metrics.val_metrics  # three classes have no top five
    averaged = any(isinstance(callback, EMAWeightAveraging) for callback in trainer.callbacks)
    assert averaged == isinstance(model, NEPA)
    assert any(not torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_features_fit_the_probe(pretrained, folders):
    model = pretrained[0]
    images = next(iter(plain_loader(folders / "val")))[0]
    with torch.no_grad():
        assert model(images).shape == (16, model.online_classifier.feature_dim)


def test_knn(pretrained, folders, tmp_path):
    classifier = KNNClassifier(
        model=pretrained[0],
        num_classes=3,
        knn_k=5,
        knn_t=0.1,
        train_dataloader_idx=0,
        val_dataloader_idx=1,
        topk=(1,),
    )
    before = backbone_weights(pretrained[0])
    trainer = Trainer(max_epochs=1, logger=False, default_root_dir=tmp_path, **QUIET)
    loaders = [plain_loader(folders / split) for split in ("train", "val")]
    results = trainer.validate(model=classifier, dataloaders=loaders, verbose=False)
    top1 = [value for result in results for name, value in result.items() if name.startswith("val_knn_top1")]
    assert len(top1) == 1 and 0.5 < top1[0] <= 1  # chance is a third
    assert not changed(pretrained[0], before)


def fit_classifier(kind, model, folders, tmp_path):
    seed_everything(0)
    classifier = kind(
        model=model,
        batch_size_per_device=16,
        feature_dim=model.online_classifier.feature_dim,
        num_classes=3,
        topk=(1,),
    )
    head = classifier.classification_head.weight.detach().clone()
    metrics = MetricCallback()
    trainer = Trainer(max_epochs=1, logger=False, default_root_dir=tmp_path, callbacks=[metrics], **QUIET)
    trainer.fit(classifier, plain_loader(folders / "train", shuffle=True), plain_loader(folders / "val"))
    assert not torch.equal(head, classifier.classification_head.weight)
    assert 0 <= metrics.val_metrics["val_top1"][-1] <= 1


def test_linear_evaluation_leaves_the_backbone_alone(pretrained, folders, tmp_path):
    model = copy.deepcopy(pretrained[0])
    before = backbone_weights(model)
    fit_classifier(LinearClassifier, model, folders, tmp_path)
    assert not changed(model, before)


def test_fine_tuning_changes_the_backbone(pretrained, folders, tmp_path):
    model = copy.deepcopy(pretrained[0])
    before = backbone_weights(model)
    fit_classifier(FinetuneClassifier, model, folders, tmp_path)
    assert {"patch_embed.proj.weight"} <= changed(model, before)
    assert len(changed(model, before)) > len(before) // 2
