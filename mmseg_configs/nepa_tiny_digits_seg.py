# The embedded demo: scenes of digits, the backbone of lightly_configs/nepa_demo.yaml, two minutes on two CPU cores.
# python tools/make_digit_scenes.py data/digit_scenes
# mim train mmsegmentation mmseg_configs/nepa_tiny_digits_seg.py
_base_ = [
    "./_base_/models/upernet_vit_b.py",
    "./_base_/datasets/digit_scenes.py",
    "./_base_/schedules/adamw_160k.py",
    "./_base_/runtime.py",
]
model = dict(
    data_preprocessor=dict(size=(32, 64)),
    backbone=dict(
        arch="nepa_vit_tiny_patch14_224",
        img_size=32,
        patch_size=4,
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.0,
        model_args=dict(embed_dim=128, depth=4, num_heads=4),
        init_cfg=dict(checkpoint="runs/demo/backbone"),
    ),
    neck=dict(embed_dim=128, rescales=[2, 1, 0.5, 0.25]),  # patches of 4 pixels are fine enough
    decode_head=dict(in_channels=[128, 128, 128, 128], channels=64, num_classes=11),
    auxiliary_head=dict(in_channels=128, channels=32, num_classes=11),
    test_cfg=dict(_delete_=True, mode="whole"),
)
# A run of 500 steps needs large ones.
optim_wrapper = dict(optimizer=dict(lr=3e-3, betas=(0.9, 0.95)), paramwise_cfg=dict(layer_decay=0.8))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=50),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=50),
]
train_cfg = dict(max_iters=500, val_interval=100)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=100))
