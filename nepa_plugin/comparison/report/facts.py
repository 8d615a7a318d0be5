"""What is equal between the rows of a comparison, what is not, and what failed."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from nepa_plugin.comparison.plan import Run
from nepa_plugin.comparison.report.methods import labels
from nepa_plugin.comparison.report.scores import by_name, values
from nepa_plugin.evaluation.results import too_short
from nepa_plugin.runtime.averaging import MOST_FIRST_WEIGHTS, first_weights


def failures(runs: Sequence[Run]) -> list[str]:
    """Return a line per run that failed."""
    return [f"{run.name}, seed {run.seed}: {run.error}" for run in runs if run.error is not None]


def caveats(runs: Sequence[Run]) -> list[str]:
    """Return a sentence per row whose score says less of its network than it seems to.

    That is an average which has not forgotten the first weights, or a fine-tuning that ends below what a linear
    classifier reads from the same network frozen.
    """
    called, said = labels(runs), []
    scored = {column: values(runs, column) for column in ("finetune", "linear")}
    for name, group in by_name(runs).items():
        momentum = group[0].summary.get("exported") == "teacher_backbone"
        exported = ("exports a momentum encoder", "momentum") if momentum else ("exports a moving average", "ema_decay")
        tuned = "is fine-tuned to a moving average", "ema_decay"
        for (what, option), shares in ((exported, map(_exported, group)), (tuned, map(_finetuned, group))):
            if (share := max(shares)) > MOST_FIRST_WEIGHTS:
                remedy = "" if option == "momentum" else ", or leave it out and it fits the run"
                said.append(
                    f"Beware: {called[name]} {what}, and {share:.0%} of it are the first weights still: lower its "
                    f"{option}{remedy}."
                )
        if not all(name in rows for rows in scored.values()):
            continue
        if words := too_short(*(mean(rows[name]) for rows in scored.values())):
            said.append(f"Beware: {called[name]} {words}")
    return said


def _exported(run: Run) -> float:
    share = run.summary.get("first_weights")
    if isinstance(share, int | float):
        return share
    if run.summary.get("exported") != "moving average":
        return 0.0
    decay = run.config.get("model", {}).get("init_args", {}).get("ema_decay")  # of a run whose summary has no share
    return _first_weights(decay, run.summary.get("steps"))


def _finetuned(run: Run) -> float:
    if (entry := run.results.get("finetune")) is None:
        return 0.0
    return _first_weights(entry["ema_decay"], entry.get("images_seen", 0) / entry["options"]["finetune"]["batch_size"])


def _first_weights(decay: Any, steps: Any) -> float:
    """Return the part that is known of; none where the number is fitted to the run, or missing."""
    known = isinstance(decay, int | float) and isinstance(steps, int | float) and steps > 0
    return first_weights(decay, int(steps)) if known else 0.0


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
        (lines ``fact: value``, lines ``fact: value (rows); other value (rows)``); of a row whose seeds are not alike,
        the seeds are named.
    """
    called = labels(runs)
    facts = {name: [_facts(run) for run in group] for name, group in by_name(runs).items() if group[0].trained}
    equal, different = [], []
    for fact in next(iter(facts.values()), [{}])[0]:
        rows: dict[str, list[str]] = {}
        for name, own in facts.items():
            told = [each.get(fact, "not so") for each in own]
            seeds = [run.seed for run in by_name(runs)[name]]
            for value in dict.fromkeys(told):  # a row's runs can come from several sittings, or folders
                of = ", ".join(str(seed) for seed, other in zip(seeds, told, strict=True) if other == value)
                alone = len(set(told)) == 1
                rows.setdefault(value, []).append(called[name] if alone else f"{called[name]} of seed {of}")
        if len(rows) == 1:
            equal.append(f"{fact}: {next(iter(rows))}")
        else:
            different.append(f"{fact}: " + "; ".join(f"{value} ({', '.join(names)})" for value, names in rows.items()))
    return equal, different
