"""Self-supervised methods, one file each."""

from nepa_plugin.methods.aim import AIM
from nepa_plugin.methods.base import Method
from nepa_plugin.methods.beit import BEiT
from nepa_plugin.methods.byol import BYOL
from nepa_plugin.methods.cpc import CPC
from nepa_plugin.methods.dino import DINO
from nepa_plugin.methods.ibot import IBOT
from nepa_plugin.methods.igpt import IGPT
from nepa_plugin.methods.ijepa import IJEPA
from nepa_plugin.methods.lejepa import LeJEPA
from nepa_plugin.methods.mae import MAE
from nepa_plugin.methods.mocov3 import MoCoV3
from nepa_plugin.methods.nepa import NEPA
from nepa_plugin.methods.simclr import SimCLR
from nepa_plugin.methods.simsiam import SimSiam

__all__ = [
    "AIM",
    "BYOL",
    "CPC",
    "DINO",
    "IBOT",
    "IGPT",
    "IJEPA",
    "MAE",
    "NEPA",
    "BEiT",
    "LeJEPA",
    "Method",
    "MoCoV3",
    "SimCLR",
    "SimSiam",
]
