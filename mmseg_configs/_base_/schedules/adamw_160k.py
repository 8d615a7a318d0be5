# 160k steps of AdamW with layer-wise learning-rate decay: the schedule of MAE and BEiT in mmsegmentation.
# Without an end, a schedule lasts as long as the run: train_cfg.max_iters.
optim_wrapper = dict(
    type="BFloat16OptimWrapper",  # float32 where there is no GPU
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="LayerDecayConstructor",
    paramwise_cfg=dict(layer_decay=0.65),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=1500),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=160000, val_interval=16000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
