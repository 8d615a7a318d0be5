# CamVid, 11 classes, UperNet, NEPA ViT-B: 8k steps, about 350 epochs of 367 images; meant for an hour on one GPU.
# mim train mmsegmentation mmseg_configs/nepa_vit_b_camvid.py \
#     --cfg-options model.backbone.init_cfg.checkpoint=runs/mine/backbone
_base_ = [
    "./_base_/models/upernet_vit_b.py",
    "./_base_/datasets/camvid.py",
    "./_base_/schedules/adamw_160k.py",
    "./_base_/runtime.py",
]
model = dict(
    data_preprocessor=dict(size=(352, 352)),
    backbone=dict(img_size=364),  # 352 to the next multiple of 14
    decode_head=dict(num_classes=11),
    auxiliary_head=dict(num_classes=11),
    test_cfg=dict(crop_size=(352, 352), stride=(234, 234)),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=400),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=400),
]
train_cfg = dict(max_iters=8000, val_interval=800)
default_hooks = dict(checkpoint=dict(interval=800))
