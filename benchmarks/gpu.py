"""Check and time on one CUDA device everything that a CPU cannot show; under nine minutes.

python benchmarks/gpu.py --out benchmarks/gpu

Every part runs in a process of its own, so that one that fails leaves the others; what it printed is in NAME.log. The
results are in gpu.json and, to read, gpu.md. Parts that the time is not enough for are said to be missing. With --toy
the same parts run at toy size, on the CPU where there is no CUDA device: nothing of this script is then new on a GPU
but the device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import nepa_plugin
from nepa_plugin import methods
from nepa_plugin.data.digits import digit_images, digits_folder
from nepa_plugin.data.pipelines import FileDataset, build_pipeline
from nepa_plugin.methods import Method
from nepa_plugin.runtime.provenance import provenance
from nepa_plugin.speed import Case, Options, benchmark, largest_batch, profile_step, step_memory
from nepa_plugin.speed.cases import NAMES
from nepa_plugin.speed.flops import matrix_peak
from nepa_plugin.speed.memory import GIB
from nepa_plugin.speed.run import RandomViews
from nepa_plugin.training.cli import main as pretrain
from nepa_plugin.training.configs import read_config
from nepa_plugin.training.curves import read_metrics
from nepa_plugin.training.finetune import base_config as finetune_base
from nepa_plugin.training.finetune import main as finetune

ROOT = Path(__file__).parent.parent
FIXTURE = ROOT / "tests" / "data" / "nepa-toy-gelu"
CONFIGS = ROOT / "lightly_configs"
#: At toy size two stand for all: the tests train every method by the same command.
TOY_METHODS = ["nepa", "ibot"]
METHODS = list(NAMES)
#: What we are after, in results' words: share of the measured bf16 peak of a ViT-B step, and compiled over eager.
GOALS = {"utilisation of ViT-B": 0.51, "compiled over eager": 1.3}
PART_SECONDS = 150


class Place:
    """Where the parts run: the device, whether at toy size, and a folder for what they write."""

    def __init__(self, toy: bool) -> None:
        self.toy = toy
        self.kind = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(self.kind)
        self.folder = Path(tempfile.mkdtemp(prefix="nepa-gpu-"))

    def synchronize(self) -> None:
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def run(self, name: str, *options: str, config: str = "nepa") -> list[float]:
        """Pretrain on the digits for ten steps of a method's own command; return the losses."""
        run_dir = self.folder / name
        pretrain(
            [
                *("--config", str(CONFIGS / f"{config}_digits.yaml"), "--run_dir", str(run_dir)),
                *("--trainer.max_steps", "2" if self.toy else "10", "--trainer.log_every_n_steps", "1"),
                *("--trainer.accelerator", self.kind, "--trainer.devices", "1", "--data.num_workers", "2"),
                *("--trainer.enable_model_summary", "false", "--trainer.enable_progress_bar", "false"),
                *(("--model.backbone_args.depth", "1") if self.toy else ()),
                *options,
            ],
            CONFIGS / "base.yaml",
        )
        nepa_plugin.load_backbone(run_dir / "backbone")
        rows = (run_dir / "metrics.csv").read_text().splitlines()
        column = rows[0].split(",").index("train_loss")
        return [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]


# -- the parts ---------------------------------------------------------------------------------------------------------


def parity(place: Place) -> dict[str, Any]:
    """The published toy model's outputs, in float32 and in bf16 autocast; largest difference over largest value."""
    expected = load_file(FIXTURE / "expected.safetensors")
    torch.backends.cuda.matmul.allow_tf32 = False
    found = {}
    for attention, key in (
        ("causal", "last_hidden_state"),
        ("bidirectional", "last_hidden_state_bidirectional"),
    ):
        model = nepa_plugin.load_backbone(FIXTURE).to(place.device).eval()
        model.set_attention(attention)
        for name, enabled in (("float32", False), ("bf16", True)):
            with torch.no_grad(), torch.autocast(place.kind, torch.bfloat16, enabled=enabled):
                output = model.forward_features(expected["pixel_values"].to(place.device)).float().cpu()
            error = float((output - expected[key]).abs().max() / expected[key].abs().max())
            found[f"{attention}, {name}"] = error
            bound = 0.1 if enabled else 1e-4
            assert error < bound, f"{attention} in {name} is off by {error:.2g} of the largest value, over {bound}"
    return found


def each(names: Iterable[str], measure: Callable[[str], str]) -> dict[str, Any]:
    """Measure by name; one failure leaves the others."""
    found = {}
    for name in names:
        try:
            found[name] = measure(name)
        except BaseException as error:
            traceback.print_exc()
            found[name] = failure(error)
    failed = [name for name, value in found.items() if value.startswith("FAILED")]
    return found | ({"failed": ", ".join(failed)} if failed else {})


def every_method(place: Place) -> dict[str, Any]:
    """The first and the last loss of ten steps of each method's digits config, by its own command."""

    def measure(name: str) -> str:
        losses = place.run(name, config=name)
        assert all(loss == loss and abs(loss) < 1e6 for loss in losses), losses
        return f"{losses[0]:.4g} -> {losses[-1]:.4g}"

    return each(TOY_METHODS if place.toy else METHODS, measure)


def waits(place: Place) -> dict[str, Any]:
    """What makes the host wait in a step of each method, by CUDA's own check: nothing."""
    batch_size = 2 if place.toy else 16

    def measure(name: str) -> str:
        model = read_config(CONFIGS / f"{name}_digits.yaml")["model"]
        cls = getattr(methods, model["class_path"].rsplit(".", 1)[1])
        method: Method = cls(batch_size_per_device=batch_size, num_classes=0, **model["init_args"])
        step = partial(one_step, method.to(place.device).train(), place, batch_size)
        step()
        step()
        place.synchronize()
        try:
            if place.kind == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            step()
        finally:
            if place.kind == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        return "none"

    return each(TOY_METHODS if place.toy else METHODS, measure)


def one_step(method: Method, place: Place, batch_size: int) -> None:
    """Forward and backward pass, clipping and AdamW, in bf16, on views that are on the device."""
    if not hasattr(method, "_gpu_batch"):
        views, _, _, *masks = RandomViews(method, batch_size).transfer_batch_to_device(None, place.device, 0)
        trained = [p for p in method.parameters() if p.requires_grad]
        object.__setattr__(method, "_gpu_batch", (views, masks))
        fused = place.kind == "cuda"
        object.__setattr__(method, "_gpu_optimizer", torch.optim.AdamW(trained, lr=1e-4, fused=fused or None))
    (views, masks), optimizer = method._gpu_batch, method._gpu_optimizer  # type: ignore[misc]
    with torch.autocast(place.kind, torch.bfloat16):
        loss = method.step(views, *masks)[0]
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


def strategies(place: Place) -> dict[str, Any]:
    """The same ten steps eager, compiled, by DDP and by FSDP in one process each; losses within 1 % of each other."""
    plain = place.run("plain")
    found: dict[str, Any] = {"eager": f"{plain[0]:.5g} -> {plain[-1]:.5g}"}
    options = {
        "compiled": ["--compile", "true"],
        "ddp": ["--trainer.strategy", "ddp"],
        "fsdp": ["--trainer.strategy", "fsdp"],
    }

    def measure(name: str) -> str:
        losses = place.run(name, *options[name])
        far = max(abs(one - other) for one, other in zip(plain, losses, strict=True))
        assert far < 0.01 * max(map(abs, plain)) + 1e-3, f"losses differ by {far:.3g}: {losses} and {plain}"
        return f"largest difference {far:.2g}"

    return found | each(options, measure)


def finetuning(place: Place) -> dict[str, Any]:
    """Ten steps of fine-tuning's own command, eager and compiled (losses within 1 %), and with mixup."""
    size = json.dumps(
        {"embed_dim": 64, "depth": 1 if place.toy else 4, "num_heads": 4, "img_size": 32, "patch_size": 4}
    )
    steps = 2 if place.toy else 10

    def losses(name: str, *options: str) -> list[float]:
        run_dir = place.folder / f"finetune-{name}"
        finetune(
            [
                *("none", "--model.backbone", "nepa_vit_tiny_patch14_224", "--model.backbone_args", size),
                *("--data", "digits", "--config", "vit_digits", "--run_dir", str(run_dir), "--data.num_workers", "2"),
                *("--trainer.max_steps", str(steps), "--trainer.log_every_n_steps", "1"),
                *("--trainer.accelerator", place.kind, "--trainer.devices", "1"),
                *("--trainer.enable_model_summary", "false", "--trainer.enable_progress_bar", "false"),
                *options,
            ],
            finetune_base(),
        )
        model = nepa_plugin.load_backbone(run_dir / "finetuned").to(place.device)
        assert model(torch.zeros(2, 3, 32, 32, device=place.device)).shape == (2, 10)
        return [value for _, value in read_metrics(run_dir / "metrics.csv")["train_loss"]]

    plain = losses("eager")

    def measure(name: str) -> str:
        found = losses(name, *{"compiled": ["--compile", "true"], "mixed": ["--model.mixup", "0.8"]}[name])
        if name == "mixed":
            return f"{found[0]:.4g} -> {found[-1]:.4g}"
        far = max(abs(one - other) for one, other in zip(plain, found, strict=True))
        assert far < 0.01 * max(map(abs, plain)), f"losses differ by {far:.3g}: {found} and {plain}"
        return f"largest difference {far:.2g}"

    others = ["mixed"] if place.toy else ["compiled", "mixed"]  # at toy size one part that compiles is enough
    return {"eager": f"{plain[0]:.4g} -> {plain[-1]:.4g}"} | each(others, measure)


def pipelines(place: Place) -> dict[str, Any]:
    """The device pipeline (nvJPEG on CUDA) against the CPU's on JPEGs and PNGs: largest and mean difference."""
    from lightly.data import LightlyDataset

    from nepa_plugin.data import NEPATransform

    folder = place.folder / "mixed" / "a"
    folder.mkdir(parents=True)
    for i, (image, _) in enumerate(zip(*digit_images(96), strict=True)):
        image.convert("RGB").save(folder / f"{i}.{'jpg' if i % 3 else 'png'}")
        if i == 11:
            break
    pipeline = build_pipeline("device", NEPATransform(64), "NEPA")
    dataset = FileDataset(LightlyDataset(str(folder.parent)), pipeline, 0, list(range(12)))
    views, _, names = pipeline.collate([dataset[0, i] for i in range(12)])
    if place.kind == "cuda":
        views = views.pin_memory()
    ours, theirs = (pipeline.finish(views, torch.device(d), names)[0].cpu() for d in (place.kind, "cpu"))
    difference = (ours - theirs).abs()
    assert difference.mean() < 0.02, f"the pixels differ by {difference.mean():.3g} standard deviations in the mean"
    losses = place.run("device-pipeline", "--data.pipeline", "device")
    return {"largest": float(difference.max()), "mean": float(difference.mean()), "losses": losses[-1]}


def kernels(place: Place) -> dict[str, Any]:
    """Which kernels a compiled ViT-B step spends its time in."""
    compiled = place.kind == "cuda"
    case = Case(batch_size=256, compiled=compiled) if not place.toy else toy_case(compiled=False)
    found = profile_step(case, Options(warmup=3, accelerator=place.kind))
    return {"case": case.label} | {kernel.name[:80]: round(kernel.share, 4) for kernel in found[:12]}


def toy_case(**more: Any) -> Case:
    return Case(**({"model": "tiny", "img_size": 28, "batch_size": 4, "depth": 2} | more))


def steps(place: Place) -> dict[str, Any]:
    """Training steps in bf16: eager and compiled, beside timm's plain ViT and NEPA's step without fused kernels."""
    if place.toy:
        chosen = [toy_case(), toy_case(contender="timm", attention="bidirectional"), toy_case(contender="written-out")]
        options = Options(steps=2, warmup=1, rounds=1, accelerator=place.kind)
    else:
        chosen = [
            Case(model=model, batch_size=batch, compiled=compiled)
            for model, batches in (("base", (256, 512)), ("large", (256,)))
            for batch in batches
            for compiled in (False, True)
        ]
        plain = Case("timm", batch_size=256, attention="bidirectional")
        timm_compiled = Case("timm", batch_size=256, attention="bidirectional", compiled=True)
        chosen[2:2] = [plain, timm_compiled, Case("written-out", batch_size=256)]
        options = Options(steps=8, warmup=3, rounds=1, accelerator=place.kind)
    report = benchmark(chosen, options, report=lambda line: print(line, flush=True))
    found: dict[str, Any] = {"matrix peak, TFLOP/s": round(max(report["matrix_peak"].values()) / 1e12, 1)}
    rates = {}
    for case, row in zip(chosen, report["results"], strict=True):
        rates[case] = row["images_per_second"]["median"]
        memory = row["peak_memory_bytes"]
        found[case.label] = (
            f"{rates[case]:.4g} images/s, {1e3 * row['seconds']['step']:.4g} ms, "
            f"{100 * row['utilisation']:.1f} % of peak" + (f", {memory / 1e9:.1f} GB" if memory else "")
        )
    if not place.toy:
        eager, compiled = (Case(batch_size=256, compiled=on) for on in (False, True))
        best = max(row["utilisation"] for row in report["results"] if row["model"] == "base")
        found["utilisation of ViT-B"] = f"{best:.3f} (goal {GOALS['utilisation of ViT-B']})"
        found["compiled over eager"] = f"{rates[compiled] / rates[eager]:.2f} (goal {GOALS['compiled over eager']})"
    return found


def memory(place: Place) -> dict[str, Any]:
    """The largest batch that was calculated, and the largest that runs, in steps of an eighth of it."""
    total = torch.cuda.get_device_properties(0).total_memory if place.kind == "cuda" else 0
    found: dict[str, Any] = {"memory, GiB": round(total / GIB, 1)}
    for model in ["tiny"] if place.toy else ["base", "large"]:
        build = toy_case if place.toy else partial(Case, model=model)
        calculated = 4 if place.toy else largest_batch(step_memory(build().method(), images=1), total)
        found[f"{model}, calculated"] = calculated
        tried = [4, 6] if place.toy else [calculated * eighths // 8 for eighths in range(7, 13)]
        largest = 0
        for batch in tried:
            try:
                method = build(batch_size=batch).method().to(place.device).train()
                for _ in range(2):
                    one_step(method, place, batch)
                place.synchronize()
                largest = batch
            except torch.OutOfMemoryError:
                break
            finally:
                method = None  # type: ignore[assignment]
                if place.kind == "cuda":
                    torch.cuda.empty_cache()
        found[f"{model}, runs"] = largest
    return found


def segmentation(place: Place) -> dict[str, Any]:
    """Iterations of the ADE20K config on random images: its losses, seconds and memory."""
    import nepa_plugin.segmentation  # noqa: F401  # before mmseg, which needs its compatibility

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from segmentation import Candidate

    if place.toy:
        os.environ["DIGIT_SCENES"] = str(place.folder)
        candidate = Candidate(str(ROOT / "mmseg_configs" / "nepa_tiny_digits_seg.py"), 4, 2, 32)
    else:
        candidate = Candidate(str(ROOT / "mmseg_configs" / "nepa_vit_b_ade20k.py"), 14, 4, 512)
    for _ in range(2 if place.toy else 100):
        candidate.timed_step(candidate.resident)
    assert all(p.isfinite().all() for p in candidate.model.parameters()), "a weight is not finite"
    seconds = sorted(candidate.seconds)
    return {
        "iterations": len(seconds),
        "median seconds": round(seconds[len(seconds) // 2], 4),
        "peak GiB": round(candidate.peak / GIB, 2),
        "attention": ", ".join(candidate.attention_ops()[:3]),
    }


def peak(place: Place) -> dict[str, Any]:
    """The device, and its measured rate of matrix products."""
    name = torch.cuda.get_device_name() if place.kind == "cuda" else "cpu"
    size = 256 if place.toy else None
    rate = matrix_peak(place.device, torch.float32 if place.toy else torch.bfloat16, size)
    return {"device": name, "torch": torch.__version__, "TFLOP/s": round(rate / 1e12, 3)}


#: The most important first: the time may not be enough for all.
PARTS: list[Callable[[Place], dict[str, Any]]] = [
    peak,
    parity,
    waits,
    strategies,
    every_method,
    finetuning,
    pipelines,
    steps,
    segmentation,
    kernels,
    memory,
]


# -- running them ------------------------------------------------------------------------------------------------------


def failure(error: BaseException) -> str:
    return f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def in_a_process(part: Callable[[Place], dict[str, Any]], toy: bool, out: Path) -> None:
    """Run a part, and write what it found beside its log."""
    name = part.__name__
    with (out / f"{name}.log").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        try:
            found = part(Place(toy))
        except BaseException as error:
            traceback.print_exc()
            found = {"failed": failure(error)}
        sys.stdout.flush()
        sys.stderr.flush()
    (out / f".{name}.json").write_text(json.dumps(found))
    os._exit(0)  # not into the parent's clean-up


def page(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    device = results["parts"].get("peak", {}).get("device", "unknown")
    lines = [
        f"# What was measured on one {device}",
        "",
        f"`{results['command']}`: {results['seconds']:.0f} seconds.",
        "",
    ]
    for name, found in results["parts"].items():
        title = next(part.__doc__ for part in PARTS if part.__name__ == name).strip().splitlines()[0]  # type: ignore[union-attr]
        lines += [f"## {name}", "", title, "", "| | |", "| --- | --- |"]
        for key, value in found.items():
            value = f"{value:.3g}" if isinstance(value, float) else str(value)
            lines.append(f"| {key} | {value} |".replace("\n", " "))
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.__name__ for part in PARTS]
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json, gpu.md and the logs")
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--toy", action="store_true", help="toy sizes, on the CPU where there is no CUDA device")
    parser.add_argument("--seconds", type=float, default=520.0, help="what there is for all parts")
    args = parser.parse_args()
    # asks the driver and not CUDA, which a process must not have started before it is forked
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if not args.toy and not torch.cuda.is_available():
        sys.exit("There is no CUDA device. --toy runs the same parts at toy size on the CPU.")
    args.out.mkdir(parents=True, exist_ok=True)
    digits_folder()
    start = time.monotonic()
    results: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), **provenance(), "goals": GOALS, "parts": {}}
    fork = multiprocessing.get_context("fork")
    for part in PARTS:
        name, left = part.__name__, args.seconds - (time.monotonic() - start)
        if name not in args.parts:
            continue
        written, began = args.out / f".{name}.json", time.monotonic()
        written.unlink(missing_ok=True)
        if left < 10:
            found = {"failed": "not run, the time was over"}
        else:
            process = fork.Process(target=in_a_process, args=(part, args.toy, args.out))
            process.start()
            process.join(min(left, PART_SECONDS))
            late = process.is_alive()
            if late:
                process.kill()
                process.join()
            found = {"failed": f"ended after {time.monotonic() - began:.0f} s" if late else "its process died"}
            with contextlib.suppress(OSError):
                found = json.loads(written.read_text())
            written.unlink(missing_ok=True)
        found["seconds"] = round(time.monotonic() - began, 1)
        results["parts"][name] = found
        results["seconds"] = time.monotonic() - start
        (args.out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
        (args.out / "gpu.md").write_text(page(results))
        print(f"{name}: {found}", flush=True)
    if any("failed" in found for found in results["parts"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
