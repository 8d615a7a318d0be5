"""Several processes without a GPU. Configs name this module in ``custom_imports``; importing it applies it.

mmengine's launchers select a CUDA device before they join a process group, and leave a group that exists as it is. So
this joins one, with gloo. On a machine with CUDA nothing happens.
"""

import os

import torch

if "RANK" in os.environ and not torch.cuda.is_available() and not torch.distributed.is_initialized():
    torch.distributed.init_process_group("gloo")
