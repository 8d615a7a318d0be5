# The demo in two processes without a GPU:
# mim train mmsegmentation mmseg_configs/nepa_tiny_digits_seg_cpu_ddp.py --launcher pytorch --gpus 2
_base_ = "./nepa_tiny_digits_seg.py"
custom_imports = dict(imports=["nepa_plugin.segmentation", "nepa_plugin.segmentation.gloo"])
model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
norm_cfg = dict(type="BN", requires_grad=True)  # SyncBN is for GPUs
model = dict(neck=dict(norm_cfg=norm_cfg), decode_head=dict(norm_cfg=norm_cfg), auxiliary_head=dict(norm_cfg=norm_cfg))
