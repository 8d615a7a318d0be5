"""What the tests of several processes look at: a callback that records a run, and how to start it with torchrun."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from pytorch_lightning.callbacks import Callback

from nepa_plugin.runtime.sharding import full_tensor, local_tensor
from nepa_plugin.training.stopping import StopTogether

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "lightly_configs" / "nepa_demo.yaml"


class Recorder(Callback):
    """Write every rank's losses, gradients and bytes of state to ``record-RANK.pt`` in the run folder.

    Args:
        terminate_at: Optimizer step at whose first batch the last rank sends itself SIGTERM.
        kill_at: Optimizer step at whose first batch the last rank kills itself, if the run has not been started again.
    """

    def __init__(self, terminate_at=None, kill_at=None):
        self.terminate_at, self.kill_at = terminate_at, kill_at
        self.losses, self.gradients = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        last = trainer.global_rank == trainer.world_size - 1
        if last and trainer.global_step == self.terminate_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if last and trainer.global_step == self.kill_at and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            (Path(trainer.default_root_dir) / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        self.gradients.append({name: grad.detach().clone() for name, grad in gradients.items()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def on_train_epoch_end(self, trainer, pl_module):
        (average,) = [c for c in trainer.callbacks if type(c).__name__ == "FusedEMA"]
        state = [v for values in trainer.optimizers[0].state.values() for v in values.values() if v.ndim]
        held = [*pl_module.parameters(), *state, *average._average_model.averages]
        record = {
            "losses": self.losses,
            "gradients": [{name: full_tensor(grad) for name, grad in step.items()} for step in self.gradients],
            "held_bytes": sum(local_tensor(t).numel() * 4 for t in held),
        }
        torch.save(record, Path(trainer.default_root_dir) / f"record-{trainer.global_rank}.pt")


class Hangs(Callback):
    """In the fourth batch every rank gets SIGTERM, and the last one answers no more."""

    def __init__(self):
        StopTogether.SECONDS = 2.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            if trainer.global_rank == trainer.world_size - 1:
                time.sleep(600)


class Stops(Callback):
    """Ends a run in its sixth step as a power cut would."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 5:
            raise KeyError("here")


class NoWaits(Callback):
    """Makes every wait of the host for CUDA an error, between the ends of two optimizer steps of one epoch.

    Args:
        first: The step after whose end nothing may wait.
        last: The step at whose end it may again.
    """

    def __init__(self, first, last):
        self.first, self.last = first, last

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in (self.first, self.last):
            torch.cuda.set_sync_debug_mode("error" if trainer.global_step == self.first else "default")

    def on_exception(self, trainer, pl_module, exception):
        torch.cuda.set_sync_debug_mode("default")


class Ranks(Callback):
    """Write every rank's losses and its weights at the end of training to ``rank-RANK.pt`` in the run folder."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)

    def on_train_end(self, trainer, pl_module):
        record = {"losses": self.losses, "state": pl_module.state_dict()}
        torch.save(record, Path(trainer.default_root_dir) / f"rank-{trainer.global_rank}.pt")


def arguments(run_dir, *more):
    """The demo's model, small, for eight steps of 128 images, of which none is logged but by ``more``."""
    return [
        *("--config", str(CONFIG), "--run_dir", str(run_dir), "--trainer.max_epochs", "2"),
        *("--model.backbone_args.embed_dim", "32", "--model.backbone_args.depth", "2"),
        *("--model.backbone_args.num_heads", "2", "--trainer.check_val_every_n_epoch", "1000"),
        *("--trainer.enable_model_summary", "false", "--data.num_workers", "0"),
        *map(str, more),
    ]


def start(processes, *runs, restarts=0):
    """Run pretraining commands one after the other, each a list of arguments, in torchrun's processes."""
    script = ROOT / "tests" / "methods" / "pretrain_several.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    devices = "--trainer.devices", str(processes)
    commands = [argument for run in runs for argument in ("--", *run, *(() if run[0] == "copy" else devices))]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = dict(os.environ, PYTHONPATH=paths, OMP_NUM_THREADS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    environment["TEST_PORT"] = os.environ["MASTER_PORT"]
    result = subprocess.run(
        [*torchrun, "--max-restarts", str(restarts), str(script), *commands[1:]],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-8000:]
    return result
