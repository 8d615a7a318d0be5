# CamVid for a CPU: 224x224 crops and 600 steps of 4, for the backbones of benchmarks/camvid.py (2.8 M parameters).
# mim train mmsegmentation mmseg_configs/nepa_small_camvid.py --cfg-options model.backbone.init_cfg.checkpoint=...
_base_ = ["./nepa_vit_b_camvid.py"]
model = dict(
    data_preprocessor=dict(size=(224, 224)),
    backbone=dict(
        arch="nepa_vit_tiny_patch14_224",
        img_size=224,
        patch_size=16,
        out_indices=(0, 2, 3, 5),
        model_args=dict(embed_dim=192, depth=6, num_heads=3),
    ),
    neck=dict(embed_dim=192),
    decode_head=dict(in_channels=[192, 192, 192, 192], channels=128),
    auxiliary_head=dict(in_channels=192, channels=64),
    test_cfg=dict(crop_size=(224, 224), stride=(168, 168)),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(373, 280), ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(224, 224), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(373, 280), keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=1e-3), paramwise_cfg=dict(layer_decay=0.8))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=60),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=60),
]
train_cfg = dict(max_iters=600, val_interval=600)
default_hooks = dict(checkpoint=dict(interval=200))
