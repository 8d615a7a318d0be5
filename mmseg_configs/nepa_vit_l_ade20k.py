# ADE20K, UperNet, NEPA ViT-L, bidirectional attention.
_base_ = [
    "./_base_/models/upernet_vit_l.py",
    "./_base_/datasets/ade20k.py",
    "./_base_/schedules/adamw_160k.py",
    "./_base_/runtime.py",
]
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.75))
