default_scope = "mmseg"
custom_imports = dict(imports=["nepa_plugin.segmentation"], allow_failed_imports=False)
custom_hooks = [
    dict(type="CheckpointGuardHook"),  # checkpoints load completely or not at all, and are not overwritten
    dict(type="ConfigCheckHook"),  # numbers have their ranges, and every option is one that is read
    dict(type="ExactResumeHook"),  # a resumed run is the one that was never stopped
    dict(type="ClassCountHook"),
    dict(type="BatchSizeHook", recipe=16),
]
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=16000, max_keep_ckpts=2, save_best="mIoU"),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="SegVisualizationHook"),
)
env_cfg = dict(
    cudnn_benchmark=True, mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0), dist_cfg=dict(backend="nccl")
)
vis_backends = [dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]
visualizer = dict(type="SegLocalVisualizer", vis_backends=vis_backends, name="visualizer")
log_processor = dict(by_epoch=False)
log_level = "INFO"
randomness = dict(seed=1337)
load_from = None
resume = False
tta_model = dict(type="SegTTAModel")
