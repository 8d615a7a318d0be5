# UperNet on NEPA ViT-L: features after blocks 7, 11, 15, 23.
_base_ = "./upernet_vit_b.py"
model = dict(
    backbone=dict(
        arch="nepa_vit_large_patch14_224",
        out_indices=(7, 11, 15, 23),
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint="runs/nepa_vit_l/backbone"),
    ),
    neck=dict(embed_dim=1024),
    decode_head=dict(in_channels=[1024, 1024, 1024, 1024], channels=1024),
    auxiliary_head=dict(in_channels=1024),
)
