"""What each method cost: time, memory, passes, compute, and parameters that are thrown away."""

from collections.abc import Callable, Sequence

from nepa_plugin.comparison.plan import Run
from nepa_plugin.comparison.report.methods import labels
from nepa_plugin.comparison.report.scores import by_name, order
from nepa_plugin.comparison.report.tables import Table


def training_pflop(run: Run) -> float | None:
    """Return the floating-point operations of the whole training, in 1e15."""
    if not run.trained:
        return None
    return float(run.summary["gflops"] * run.summary["images_seen"] / 1e6)


def finetuning_pflop(run: Run) -> float | None:
    """Return the floating-point operations of the whole fine-tuning, in 1e15, where they were counted."""
    entry = run.results.get("finetune", {})
    return float(entry["gflops"] * entry["images_seen"] / 1e6) if "gflops" in entry else None


def compute_unit(runs: Sequence[Run]) -> tuple[str, float]:
    """Return the unit in which the trainings' operations are written, and how many of it make 1e15."""
    largest = max((pflop for run in runs if (pflop := training_pflop(run)) is not None), default=0.0)
    return ("PFLOP", 1.0) if largest >= 0.1 else ("TFLOP", 1e3)


def spread(numbers: Sequence[float | None], form: str = ".1f") -> str:
    """Return the mean of the values and, of several, their range: ``81.2 (80.5-81.9)``."""
    known = [v for v in numbers if v is not None]
    if not known:
        return ""
    average = f"{sum(known) / len(known):{form}}"
    if len(known) == 1:
        return average
    return f"{average} ({min(known):{form}}-{max(known):{form}})"


def spread_if_different(numbers: Sequence[float | None], form: str) -> str:
    """Return one number where all are equal when written, else :func:`spread`."""
    texts = {f"{v:{form}}" for v in numbers if v is not None}
    return texts.pop() if len(texts) == 1 else spread(numbers, form)


def cost_tables(runs: Sequence[Run]) -> list[Table]:
    """Return what each method cost: measured, and counted per image."""
    return [table for table in (_measured_cost(runs), _counted_cost(runs)) if table.rows]


_Column = tuple[str, Callable[[Run], float | None], str]


def _table(heading: str, runs: Sequence[Run], wanted: list[_Column], note: str) -> Table:
    called, groups, rows = labels(runs), by_name(runs), []
    for name in (name for name in order(runs) if groups[name][0].trained):
        cells = [spread_if_different([get(run) for run in groups[name]], form) for _, get, form in wanted]
        rows.append([called[name], *cells])
    return Table(heading, ["method", *(title for title, _, _ in wanted)], rows, note)


def _measured_cost(runs: Sequence[Run]) -> Table:
    wanted: list[_Column] = [
        ("epochs", lambda r: r.summary["epochs"], ".0f"),
        ("images seen", lambda r: r.summary["images_seen"], ",.0f"),
        ("pretraining, s", lambda r: r.summary["seconds"], ".0f"),
        ("images/s", lambda r: r.summary["images_per_second"], ".0f"),
        ("peak memory, MiB", lambda r: r.summary["peak_memory_bytes"] / 2**20, ".0f"),
    ]
    if any("finetune" in run.results for run in runs):
        wanted.append(("fine-tuning, s", lambda r: r.results.get("finetune", {}).get("seconds"), ".0f"))
    on_cpu = any(run.trained and "cpu" in run.summary["devices"] for run in runs)
    note = "Pretraining without validation; fine-tuning with it. " + (
        "Peak memory is the whole process's, libraries included."
        if on_cpu
        else "Peak memory is what the first device's allocator held."
    )
    return _table("Cost, measured", runs, wanted, note)


def _counted_cost(runs: Sequence[Run]) -> Table:
    unit, factor = compute_unit(runs)
    wanted: list[_Column] = [
        ("views", lambda r: r.summary["views"], ".0f"),
        ("encoder passes", lambda r: r.summary["encoder_passes"], ".3g"),
        ("encoder tokens", lambda r: r.summary["encoder_tokens"], ".0f"),
        ("GFLOP/image", lambda r: r.summary["gflops"], ".3g"),
        (f"{unit} in all", lambda r: factor * r.summary["gflops"] * r.summary["images_seen"] / 1e6, ".3g"),
        ("backbone, M", lambda r: r.summary["backbone_parameters"] / 1e6, ".3g"),
        ("thrown away, M", lambda r: r.summary["discarded_parameters"] / 1e6, ".3g"),
    ]
    note = (
        "Of pretraining, per image and training step, counted in one step: passes through the backbone and the "
        "momentum encoder; operations of the forward and backward pass, decoders and heads included. Thrown away: "
        "trainable parameters outside the backbone."
    )
    if any(finetuning_pflop(run) for run in runs):
        wanted.append((f"fine-tuning, {unit}", lambda r: factor * (finetuning_pflop(r) or 0.0), ".3g"))
    return _table("Cost, counted", runs, wanted, note)
