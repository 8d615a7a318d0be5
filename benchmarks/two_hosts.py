"""Pretraining on two hosts that are network namespaces of this machine: equal losses, a lost host, and its restart.

sudo python benchmarks/two_hosts.py --out runs/two_hosts

Each namespace has its own network, joined by a virtual cable, and runs torchrun as a machine of a cluster would, one
gloo process each. Needs Linux, root and iproute2's `ip`; says so where one is missing, with status 77, and leaves
neither namespaces nor processes behind.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
HOSTS = {"nepa-host-a": "10.77.55.1", "nepa-host-b": "10.77.55.2"}
CABLE = {"nepa-host-a": "nepa-veth-a", "nepa-host-b": "nepa-veth-b"}
PORT = 29417
SKIPPED = 77


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True)


def plug_in() -> None:
    """Make the two hosts and their cable."""
    unplug()
    for host in HOSTS:
        ip("netns", "add", host)
    ip("link", "add", CABLE["nepa-host-a"], "type", "veth", "peer", "name", CABLE["nepa-host-b"])
    for host, address in HOSTS.items():
        ip("link", "set", CABLE[host], "netns", host)
        ip("-n", host, "addr", "add", f"{address}/24", "dev", CABLE[host])
        ip("-n", host, "link", "set", CABLE[host], "up")
        ip("-n", host, "link", "set", "lo", "up")


def unplug() -> None:
    for host in HOSTS:
        ip("netns", "del", host, check=False)
    ip("link", "del", CABLE["nepa-host-a"], check=False)


def options(run_dir: Path, batch_size: int, *more: str) -> list[str]:
    size = ["--model.backbone_args.embed_dim", "32", "--model.backbone_args.depth", "2"]
    return [
        *("--config", str(ROOT / "lightly_configs" / "nepa_demo.yaml"), "--run_dir", str(run_dir), *size),
        *("--model.backbone_args.num_heads", "2", "--trainer.max_epochs", "20", "--trainer.log_every_n_steps", "1"),
        *("--trainer.accelerator", "cpu", "--data.num_workers", "0", "--data.batch_size_per_device", str(batch_size)),
        *("--checkpoint_every_n_steps", "10", "--trainer.enable_model_summary", "false", *more),
    ]


def start(host: str, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start torchrun on a host."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{HOSTS['nepa-host-a']}:{PORT}", "--rdzv_id", "nepa"]
    # the hosts share the machine's name, by which torchrun would find out which of them is the endpoint
    rendezvous += ["--rdzv_conf", f"is_host={str(host == 'nepa-host-a').lower()}"]
    command = [*torchrun, *rendezvous, "--local_addr", HOSTS[host], str(ROOT / "tools" / "pretrain.py"), *arguments]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), GLOO_SOCKET_IFNAME=CABLE[host], OMP_NUM_THREADS="1")
    with log.open("ab") as file:
        return subprocess.Popen(
            ["ip", "netns", "exec", host, *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def both(out: Path, *more: str) -> list[subprocess.Popen[bytes]]:
    arguments = options(out / "run", 64, "--trainer.num_nodes", "2", "--trainer.devices", "1", *more)
    return [start(host, arguments, out / f"{host}.log") for host in HOSTS]


def kill(host: str) -> None:
    """Kill all that runs on a host; torchrun's own process group does not hold the processes that it starts."""
    pids = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True).stdout.split()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    for host in HOSTS:
        kill(host)
    for process in processes:
        process.wait()


def losses(run_dir: Path) -> dict[int, float]:
    with (run_dir / "metrics.csv").open() as file:
        return {int(row["step"]): float(row["train_loss"]) for row in csv.DictReader(file) if row.get("train_loss")}


def wait_for_step(out: Path, step: int, processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + 300
    while not (out / "run" / "metrics.csv").is_file() or max(losses(out / "run"), default=-1) < step:
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            raise SystemExit(f"Step {step} was not reached: {out} has the logs.")
        time.sleep(0.2)


def finish(out: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.wait(timeout=300):
            raise SystemExit(f"A host ended with status {process.returncode}: {out} has the logs.")


def largest_difference(one: dict[int, float], other: dict[int, float]) -> float:
    if list(one) != sorted(other):
        raise SystemExit(f"Other steps than on one host: {sorted(other)} instead of {list(one)}.")
    return max(abs(one[step] - other[step]) for step in one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and logs, which must not exist")
    args = parser.parse_args()
    missing = [
        what
        for what, there in (
            ("Linux", sys.platform == "linux"),
            ("root", hasattr(os, "geteuid") and os.geteuid() == 0),
            ("iproute2 (the command ip)", shutil.which("ip") is not None),
        )
        if not there
    ]
    if not missing:
        try:
            plug_in()
        except subprocess.CalledProcessError as error:
            unplug()
            missing = [f"network namespaces ({error.stderr.decode().strip()})"]
    if missing:
        print(f"Skipped: two hosts on one machine need {', '.join(missing)}.")
        sys.exit(SKIPPED)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        args.out.mkdir(parents=True)
        one = [sys.executable, str(ROOT / "tools" / "pretrain.py"), *options(args.out / "one", 128)]
        subprocess.run(one, check=True, stdout=subprocess.DEVNULL, env=dict(os.environ, PYTHONPATH=str(ROOT)))
        reference = losses(args.out / "one")

        whole = args.out / "equal"
        whole.mkdir()
        processes = both(whole)
        finish(whole, processes)
        two = losses(whole / "run")
        far = largest_difference(
            {k: v for k, v in reference.items() if k < 30}, {k: v for k, v in two.items() if k < 30}
        )
        print(f"two hosts: {len(two)} steps; largest difference to one process in the first 30: {far:.2g}", flush=True)

        lost = args.out / "lost"
        lost.mkdir()
        processes = both(lost)
        wait_for_step(lost, 40, processes)
        kill("nepa-host-b")
        began = time.monotonic()
        status = processes[0].wait(timeout=300)
        print(
            f"a host was lost after step {max(losses(lost / 'run'))}: the other ended with status {status} "
            f"{time.monotonic() - began:.0f} s later",
            flush=True,
        )
        if status == 0 or (lost / "run" / "backbone").exists():
            raise SystemExit("The other host went on as if nothing had happened.")
        end(processes)
        processes = both(lost, "--ckpt_path", "auto")
        finish(lost, processes)
        far = largest_difference(two, losses(lost / "run"))
        print(f"started again: largest difference to the run that lost no host: {far:.2g}")
    finally:
        end(processes)
        unplug()


if __name__ == "__main__":
    main()
