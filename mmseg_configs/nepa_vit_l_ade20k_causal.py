# Ablation: causal attention in the transfer, as in pretraining.
_base_ = "./nepa_vit_l_ade20k.py"
model = dict(backbone=dict(attention="causal"))
