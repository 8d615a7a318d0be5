"""The numbers of a comparison: accuracies, costs, and what is not equal between its rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import rich.table
from rich.markup import escape

from nepa_plugin.comparison.plan import Run
from nepa_plugin.evaluation.readout import ReadoutRow, best_row, chosen_held_out

#: Poolings among which the best readout is looked for: those that every backbone has. Under causal attention the class
#: token sees only itself, so it is left out.
READOUT_POOLS = ("last", "mean", "concat")
PROTOCOLS = {"knn": "kNN", "linear": "linear", "attentive": "attentive", "finetune": "fine-tuned"}


def best_readout(run: Run) -> tuple[float, str] | None:
    """Return the best linear readout of a run, in per cent, and where in the network it was."""
    rows = readout_rows(run)
    if not rows:
        return None
    best = best_row(rows)
    return best.linear, f"{best.depth}, {best.pool}"


def readout_rows(run: Run) -> list[ReadoutRow]:
    """Return the readout's rows among which the best is looked for."""
    rows = run.results.get("readout", {}).get("rows", [])
    return [ReadoutRow(**row) for row in rows if row["pool"] in READOUT_POOLS]


def score(run: Run, protocol: str) -> float | None:
    """Return a protocol's top-1 accuracy in per cent, or nothing where it was not run."""
    if protocol == "readout":
        best = best_readout(run)
        return best[0] if best else None
    value = run.results.get(protocol, {}).get("top1")
    return None if value is None else float(value)


def training_pflop(run: Run) -> float | None:
    """Return the floating-point operations of the whole training, in 1e15."""
    if not run.trained:
        return None
    return float(run.summary["gflops"] * run.summary["images_seen"] / 1e6)


def compute_unit(runs: Sequence[Run]) -> tuple[str, float]:
    """Return the unit in which the trainings' operations are written, and how many of it make 1e15."""
    largest = max((pflop for run in runs if (pflop := training_pflop(run)) is not None), default=0.0)
    return ("PFLOP", 1.0) if largest >= 0.1 else ("TFLOP", 1e3)


def spread(values: Sequence[float | None], form: str = ".1f") -> str:
    """Return the mean of the values and, of several, their range: ``81.2 (80.5-81.9)``."""
    known = [v for v in values if v is not None]
    if not known:
        return ""
    mean = f"{sum(known) / len(known):{form}}"
    if len(known) == 1:
        return mean
    return f"{mean} ({min(known):{form}}-{max(known):{form}})"


def by_name(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs that did not fail by name, in order."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.error is None:
            groups.setdefault(run.name, []).append(run)
    return groups


@dataclass(frozen=True)
class Table:
    """A table of text cells under a heading, with a note below it."""

    heading: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""

    def as_rich(self) -> rich.table.Table:
        """Return it for the terminal."""
        table = rich.table.Table(title=self.heading, caption=self.note)
        for i, title in enumerate(self.header):
            table.add_column(title, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table


def accuracy_table(runs: Sequence[Run]) -> Table:
    """Return top-1 accuracies per row of the comparison, with their range over seeds."""
    protocols = [p for p in PROTOCOLS if any(p in run.results for run in runs)]
    header = ["method", "seeds", *(PROTOCOLS[p] for p in protocols)]
    readout = any("readout" in run.results for run in runs)
    header += ["best readout", "where"] if readout else []
    rows = []
    for name, group in by_name(runs).items():
        row = [name, str(len(group)), *(spread([score(run, p) for run in group]) for p in protocols)]
        if readout:
            places = [best[1] for run in group if (best := best_readout(run))]
            row += [spread([score(run, "readout") for run in group]), "; ".join(dict.fromkeys(places))]
        rows.append(row)
    note = "Top-1 accuracy on the validation images in per cent: mean and, in brackets, range over seeds."
    if readout:
        note += (
            " The best readout is the best linear probe over all depths and the last token, the mean of the patch "
            "tokens, and the means of the last depths put side by side (concat). "
        )
        if all(chosen_held_out(readout_rows(run)) for run in runs if run.results.get("readout")):
            note += (
                "Each run's is chosen on a fifth of the training images, held out for that, and scored like the rest."
            )
        else:
            note += "It is chosen on the validation images, for some rows at least, so it is an optimistic number."
    return Table("Accuracy", header, rows, note)


def cost_table(runs: Sequence[Run]) -> Table:
    """Return what each method cost: time, memory, passes, compute, and parameters that are thrown away."""
    unit, factor = compute_unit(runs)
    columns: list[tuple[str, Callable[[dict[str, Any]], float | None], str]] = [
        ("epochs", lambda s: s["epochs"], ".0f"),
        ("images seen", lambda s: s["images_seen"], ",.0f"),
        ("training, s", lambda s: s["seconds"], ".0f"),
        ("images/s", lambda s: s["images_per_second"], ".0f"),
        ("peak memory, MiB", lambda s: s["peak_memory_bytes"] / 2**20, ".0f"),
        ("views", lambda s: s["views"], ".0f"),
        ("encoder passes", lambda s: s["encoder_passes"], ".3g"),
        ("encoder tokens", lambda s: s["encoder_tokens"], ".0f"),
        ("GFLOP/image", lambda s: s["gflops"], ".3g"),
        (f"{unit} in all", lambda s: factor * s["gflops"] * s["images_seen"] / 1e6, ".3g"),
        ("backbone, M", lambda s: s["backbone_parameters"] / 1e6, ".3g"),
        ("thrown away, M", lambda s: s["discarded_parameters"] / 1e6, ".3g"),
    ]
    rows = []
    for name, group in by_name(runs).items():
        if group[0].trained:
            cells = [spread_if_different([get(run.summary) for run in group], form) for _, get, form in columns]
            rows.append([name, *cells])
    note = (
        "Training without validation. Views, encoder passes, encoder tokens and GFLOP are per image and training step, "
        "counted in one step: passes through the backbone and the momentum encoder; operations of the forward and "
        "backward pass, decoders and heads included. Thrown away: trainable parameters outside the backbone. "
    )
    on_cpu = any(run.trained and "cpu" in run.summary["devices"] for run in runs)
    note += (
        "Peak memory is the whole process's, libraries included."
        if on_cpu
        else "Peak memory is what the first device's allocator held."
    )
    return Table("Cost", ["method", *(title for title, _, _ in columns)], rows, note)


def spread_if_different(values: Sequence[float | None], form: str) -> str:
    """Return one number where all are equal when written, else :func:`spread`."""
    texts = {f"{v:{form}}" for v in values if v is not None}
    return texts.pop() if len(texts) == 1 else spread(values, form)


def failures(runs: Sequence[Run]) -> list[str]:
    """Return a line per run that failed."""
    return [f"{run.name}, seed {run.seed}: {run.error}" for run in runs if run.error is not None]


def _facts(run: Run) -> dict[str, str]:
    summary, model = run.summary, run.config.get("model", {}).get("init_args", {})
    nepa = summary["backbone_class"] == "NepaViT"
    sizes = summary["backbone"].get("model_args", {})
    hardware = summary["hardware"]
    return {
        "training images": f"{summary['train_images']} ({summary['train_fingerprint']})",
        "images seen": f"{summary['images_seen']:,}",
        "global batch": str(summary["global_batch_size"]),
        "backbone parameters": f"{summary['backbone_parameters']:,}",
        "backbone": f"{summary['backbone_class']} "
        + ", ".join(f"{k} {sizes[k]}" for k in ("embed_dim", "depth", "num_heads", "patch_size") if k in sizes),
        "position embedding": "RoPE, rescaled at random in training" if nepa else "absolute",
        "QK-norm": "without weight and bias" if nepa else str(sizes.get("qk_norm", "as the named model has it")),
        "attention in pretraining": summary["attention"],
        "views per image": str(summary["views"]),
        "encoder passes per image": f"{summary['encoder_passes']:.3g}",
        "crop area": str(model.get("crop_scale") or (model.get("transform_args") or {}).get("min_scale") or "default"),
        "exported weights": summary["exported"],
        "AdamW lr per 256, weight decay, betas": f"{model.get('base_lr')}, {model.get('weight_decay')}"
        + (f" to {model['final_weight_decay']}" if model.get("final_weight_decay") is not None else "")
        + f", {tuple(model.get('betas', ()))}",
        "warm-up": str(model.get("warmup_steps") or f"{model.get('warmup_fraction')} of the steps"),
        "gradient clipping": str(model.get("clip_grad_norm")),
        "devices": f"{summary['devices']}, {hardware['threads']} threads, "
        + (", ".join(hardware["gpus"]) or hardware["cpu"]),
        "precision": summary["precision"],
        **_finetuning(run),
        "torch, lightly, timm": ", ".join(str(summary["versions"].get(k)) for k in ("torch", "lightly", "timm")),
    }


def _finetuning(run: Run) -> dict[str, str]:
    """Return how a run was fine-tuned, if it was."""
    entry = run.results.get("finetune")
    if entry is None:
        return {}
    options = entry["options"]["finetune"]
    nepa = run.summary["backbone_class"] == "NepaViT"
    head_lr = options["head_lr"]
    return {
        "fine-tuning": f"{options['epochs']} epochs of batch {options['batch_size']}, "
        f"lr {options['lr']:g} per 256 (head {head_lr if head_lr is None else format(head_lr, 'g')}), "
        f"layer decay {options['layer_decay']:g}, moving average {entry['ema_decay']:.4g}",
        "attention in fine-tuning": (options["attention"] or run.summary["attention"]) if nepa else "bidirectional",
        "fine-tuned network that counts": options["select"] + " epoch",
    }


def inequalities(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """Return what all pretraining runs share and what differs between them, a line each.

    Args:
        runs: All runs.

    Returns:
        (lines ``fact: value``, lines ``fact: value (rows); other value (rows)``).
    """
    facts = {name: _facts(group[0]) for name, group in by_name(runs).items() if group[0].trained}
    equal, different = [], []
    for fact in next(iter(facts.values()), {}):
        rows: dict[str, list[str]] = {}
        for name, values in facts.items():
            rows.setdefault(values[fact], []).append(name)
        if len(rows) == 1:
            equal.append(f"{fact}: {next(iter(rows))}")
        else:
            different.append(f"{fact}: " + "; ".join(f"{value} ({', '.join(names)})" for value, names in rows.items()))
    return equal, different
