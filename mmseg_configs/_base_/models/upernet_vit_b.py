# UperNet on NEPA ViT-B: features after blocks 3, 5, 7, 11 through a feature pyramid, FCN auxiliary head.
norm_cfg = dict(type="SyncBN", requires_grad=True)  # mmengine makes it BatchNorm in a single process
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[127.5, 127.5, 127.5],  # NEPA's normalisation: 0.5 of the range for both
        std=[127.5, 127.5, 127.5],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(512, 512),
    ),
    backbone=dict(
        type="TimmViT",
        arch="nepa_vit_base_patch14_224",
        img_size=518,  # 512 to the next multiple of 14
        out_indices=(3, 5, 7, 11),
        drop_path_rate=0.1,
        attention="bidirectional",
        # None for random weights; a folder that does not exist is an error
        init_cfg=dict(type="Pretrained", checkpoint="runs/nepa_vit_b/backbone"),
    ),
    neck=dict(type="Feature2Pyramid", embed_dim=768, rescales=[4, 2, 1, 0.5], norm_cfg=norm_cfg),
    decode_head=dict(
        type="UPerHead",
        in_channels=[768, 768, 768, 768],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=768,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_channels=768,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=0.4),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
