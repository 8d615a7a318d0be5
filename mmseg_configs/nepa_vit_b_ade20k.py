# ADE20K, UperNet, NEPA ViT-B, bidirectional attention.
# mim train mmsegmentation mmseg_configs/nepa_vit_b_ade20k.py \
#     --cfg-options model.backbone.init_cfg.checkpoint=runs/mine/backbone
# Multi-scale and flip: mim test mmsegmentation mmseg_configs/nepa_vit_b_ade20k.py --checkpoint CHECKPOINT --tta
_base_ = [
    "./_base_/models/upernet_vit_b.py",
    "./_base_/datasets/ade20k.py",
    "./_base_/schedules/adamw_160k.py",
    "./_base_/runtime.py",
]
