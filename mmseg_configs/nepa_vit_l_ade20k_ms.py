# Multi-scale and flip test of a checkpoint of nepa_vit_l_ade20k.py:
# mim test mmsegmentation mmseg_configs/nepa_vit_l_ade20k_ms.py --checkpoint CHECKPOINT
_base_ = "./nepa_vit_l_ade20k.py"
model = dict(_delete_=True, type="SegTTAModel", module={{_base_.model}})
test_dataloader = dict(dataset=dict(pipeline={{_base_.tta_pipeline}}))
