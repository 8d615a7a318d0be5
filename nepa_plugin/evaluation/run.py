"""Evaluates one backbone on one set of images with one or several protocols."""

import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from rich.progress import track
from torch import nn

from nepa_plugin.checkpoints import open_backbone, save_backbone, untrained_like, weights_hash, write_best_feature
from nepa_plugin.data.errors import DataError
from nepa_plugin.data.evaluation import ImageFormat
from nepa_plugin.data.files import content_fingerprint
from nepa_plugin.evaluation.attentive import TokenSet, attentive_probe, attentive_probe_tokens
from nepa_plugin.evaluation.cache import FeatureCache, files_hash, model_description
from nepa_plugin.evaluation.features import (
    DepthFeatures,
    FrozenFeatures,
    check_depth,
    check_model,
    depth_names,
    extract_depth_features,
    from_pairs,
    frozen,
    gather_features,
    pool_names,
)
from nepa_plugin.evaluation.finetune import finetune
from nepa_plugin.evaluation.head import check_head, head_accuracy
from nepa_plugin.evaluation.images import Images, Split, open_images, ordered_loader
from nepa_plugin.evaluation.knn import knn_accuracy
from nepa_plugin.evaluation.linear import linear_probe, logistic_probe
from nepa_plugin.evaluation.memory import Sizes, check_memory, memory_steps
from nepa_plugin.evaluation.options import EvaluationOptions
from nepa_plugin.evaluation.processes import Runtime, environment, find_devices, launch
from nepa_plugin.evaluation.readout import ReadoutRow, best_row, chosen_held_out, readout, readout_figure
from nepa_plugin.evaluation.results import check_same_data, read_results, readout_rows, write_results
from nepa_plugin.evaluation.streamed import streamed_readout
from nepa_plugin.runtime.places import check_folder

PROTOCOLS = ("knn", "linear", "attentive", "finetune", "readout", "head")
Pair = tuple[str, str]  # depth and pooling


def evaluate(
    source: str | Path | nn.Module,
    data: str | Path,
    protocols: Sequence[str],
    options: EvaluationOptions | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Evaluate a backbone.

    Features are extracted once for all protocols. With several devices every process calls this; process zero scores,
    writes and returns the results, the others return an empty dictionary.

    Args:
        source: Anything :func:`nepa_plugin.load_backbone` reads, a timm model name, or a model. Its weights are left as
            they are by every protocol.
        data: ``"digits"``, or a folder that holds ``train`` and ``val`` with a sub-folder per class.
        protocols: Of ``knn``, ``linear``, ``attentive``, ``finetune``, ``readout`` and ``head`` (of a classifier).
        options: How; the defaults if left out.
        out: Folder for ``results.json`` and ``readout.png``. A fine-tuned NEPA predictor is saved there as
            ``finetuned``. Nothing is written by default.

    Returns:
        ``backbone`` and ``data`` (what was evaluated), and ``protocols``: per protocol ``top1`` in per cent (``rows``
        of the readout), its options, seed, ``seconds``, versions, commit and hardware.

    Raises:
        ValueError: If a protocol is unknown, an option does not fit, or the images cannot be used.
        FileNotFoundError: If there is no such backbone.
    """
    options = options or EvaluationOptions()
    images = check_evaluation(data, protocols, options)
    if out is not None:
        check_folder(out)
        read_results(out)
    runtime = launch(options.accelerator, options.devices, options.progress, options.precision)
    model = open_backbone(source, options.model_args, options.untrained, options.seed, options.weights)
    name = type(source).__name__ if isinstance(source, nn.Module) else str(source)
    return _Evaluation(model, name, images, runtime, options).run(protocols, out)


def check_evaluation(data: str | Path, protocols: Sequence[str], options: EvaluationOptions | None = None) -> Images:
    """Check all that can be checked without a backbone, before anything long starts.

    Args:
        data: As for :func:`evaluate`.
        protocols: As for :func:`evaluate`.
        options: As for :func:`evaluate`.

    Returns:
        The images.

    Raises:
        ValueError: If a protocol is unknown, the devices are missing, or the images cannot be used.
    """
    options = options or EvaluationOptions()
    unknown = [name for name in protocols if name not in PROTOCOLS]
    if unknown or not protocols:
        raise ValueError(f"protocol {', '.join(unknown) or 'missing'}: give one or several of {', '.join(PROTOCOLS)}.")
    images = open_images(data, find_devices(options.accelerator, options.devices).count, options.max_image_pixels)
    if options.k > len(images.train) and {"knn", "readout"} & set(protocols):
        raise DataError(f"k = {options.k} neighbours, but only {len(images.train)} training images: lower k.")
    return images


class _Evaluation:
    def __init__(
        self, model: nn.Module, source: str, images: Images, runtime: Runtime, options: EvaluationOptions
    ) -> None:
        check_model(model)
        self.model: Any = model
        self.images = images
        self.runtime = runtime
        self.options = options
        self.attentive_depth = options.attentive.depth or options.depth
        for depth in (options.depth, self.attentive_depth):
            check_depth(model, depth)
        if options.pool not in pool_names(model):
            raise ValueError(f"pool {options.pool!r}: this model's features are {', '.join(pool_names(model))}.")
        self.form = ImageFormat.of(model, options.crop_pct, options.crop_mode)
        self.solver = options.linear.choose(len(images.train))
        with frozen(model):
            example = torch.zeros(1, 3, *self.form.size, device=next(model.parameters()).device)
            self._tokens = FrozenFeatures(model, "final norm", None)(example).shape[1]
        self.seconds = 0.0
        self.results: dict[str, Any] = {
            "backbone": {
                "source": source,
                "untrained": options.untrained,
                "architecture": getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__),
                "attention": getattr(model, "attention", "bidirectional"),
                "parameters": sum(p.numel() for p in model.parameters()),
                "weights_sha256": weights_hash(model),
            },
            "data": {
                "source": images.source,
                "train_images": len(images.train),
                "val_images": len(images.val),
                "classes": images.classes,
                "images_sha256": {
                    split: content_fingerprint(images.split(cast(Split, split))) for split in ("train", "val")
                },
                "files_sha256": {split: files_hash(images.split(cast(Split, split))) for split in ("train", "val")},
            },
            "protocols": {},
        }

    def run(self, protocols: Sequence[str], out: str | Path | None) -> dict[str, Any]:
        if "head" in protocols:
            check_head(self.model, self.images)
        before = read_results(out) if out is not None else None
        if before is not None:
            check_same_data(before, self.results, Path(cast(str, out)) / "results.json")
        cached_tokens = "attentive" in protocols and self._tokens_fit()
        wanted = self._wanted(protocols, cached_tokens)
        pooled = sum(pool != "tokens" for _, pool in wanted)
        sizes = Sizes.of(self.model, self._tokens, self.images, self.runtime)
        check_memory(memory_steps(sizes, protocols, self.options, pooled, cached_tokens), self.runtime.device)
        start = time.perf_counter()
        features = self._features(self.model, wanted) if wanted else None
        self.seconds = time.perf_counter() - start
        # what trains on all devices comes first: nothing waits for process zero while it scores alone
        place = self.images, self.form, self.runtime
        workers, seed = self.options.num_workers, self.options.seed
        if "linear" in protocols and self.solver == "sgd":
            with self._timed("linear", out) as entry:
                what = self.options.linear, self.options.depth, self.options.pool
                entry |= linear_probe(self.model, *place, *what, num_workers=workers, seed=seed)
        if "attentive" in protocols and not cached_tokens:
            with self._timed("attentive", out) as entry:
                options = self.options.attentive, self.attentive_depth
                entry |= attentive_probe(self.model, *place, *options, num_workers=workers, seed=seed)
        if "head" in protocols:
            with self._timed("head", out) as entry:
                entry |= head_accuracy(self.model, *place, self.options.batch_size, workers)
        if "finetune" in protocols:
            self._finetune(out)
        if "readout" in protocols and self.solver == "sgd":
            with self._timed("readout", out) as entry:
                networks = {"rows": self.model}
                if self.options.floor:
                    networks["untrained_rows"] = untrained_like(self.model, self.options.seed)
                for name, network in networks.items():
                    entry[name] = [asdict(row) for row in streamed_readout(network, *place, self.options)]
            self._keep_readout(out)
        floor = None
        if "readout" in protocols and self.solver == "logistic" and self.options.floor:
            pairs = [pair for pair in wanted if pair[1] != "tokens"]
            floor = self._features(untrained_like(self.model, self.options.seed), pairs)
        if self.runtime.rank:
            return {}
        if features is not None:
            self._score(protocols, features, floor, cached_tokens, out)
        return self.results

    def _wanted(self, protocols: Sequence[str], tokens: bool) -> list[Pair]:
        pairs: list[Pair] = []
        if "readout" in protocols and self.solver == "logistic":
            pairs += [(depth, pool) for depth in depth_names(self.model) for pool in pool_names(self.model)]
        if "knn" in protocols or ("linear" in protocols and self.solver == "logistic"):
            pairs.append((self.options.depth, self.options.pool))
        if tokens:
            pairs.append((self.attentive_depth, "tokens"))
        return list(dict.fromkeys(pairs))

    def _tokens_fit(self) -> bool:
        if self.options.attentive.augment or self.runtime.world_size > 1:
            return False
        per_image = self._tokens * self.model.num_features * 4
        count = len(self.images.train) + len(self.images.val)
        return bool(per_image * count <= self.options.attentive.max_token_gb * 1e9)

    def _score(
        self,
        protocols: Sequence[str],
        features: tuple[DepthFeatures, DepthFeatures],
        floor: tuple[DepthFeatures, DepthFeatures] | None,
        cached_tokens: bool,
        out: str | Path | None,
    ) -> None:
        train, val = features
        options, depth, pool = self.options, self.options.depth, self.options.pool
        if "knn" in protocols or ("linear" in protocols and self.solver == "logistic"):
            data = train.features[depth][pool], train.labels, val.features[depth][pool], val.labels
        if "knn" in protocols:
            with self._timed("knn", out) as entry:
                entry["top1"] = knn_accuracy(*data, options.k, options.temperature, self.runtime.device)
        if "linear" in protocols and self.solver == "logistic":
            with self._timed("linear", out) as entry:
                entry["top1"] = logistic_probe(*data, C=options.linear.C)
        if cached_tokens:
            with self._timed("attentive", out) as entry:
                fit, score = (TokenSet(part.tokens[self.attentive_depth], part.labels) for part in features)
                arguments = len(self.images.classes), self.runtime, options.attentive, options.seed
                entry |= attentive_probe_tokens(fit, score, *arguments)
        if "readout" in protocols and self.solver == "logistic":
            with self._timed("readout", out) as entry:
                device = self.runtime.device
                knn = options.k, options.temperature
                for name, pair in (("rows", features), ("untrained_rows", floor)):
                    if pair is not None:
                        entry[name] = [
                            asdict(row) for row in readout(*pair, *knn, options.linear.C, options.concat, device)
                        ]
            self._keep_readout(out)

    def _keep_readout(self, out: str | Path | None) -> None:
        """Draw the readout, and write down beside a backbone's folder which of its features is best."""
        if self.runtime.rank:
            return
        if out is not None:
            readout_figure(readout_rows(self.results), Path(out) / "readout.png")
        folder = Path(self.results["backbone"]["source"])
        if self.options.untrained or self.options.model_args or not (folder / "config.json").is_file():
            return
        rows = [ReadoutRow(**row) for row in self.results["protocols"]["readout"]["rows"] if row["pool"] != "concat"]
        best = best_row(rows)
        chosen_on = f"{'held-out training' if chosen_held_out(rows) else 'validation'} images"
        about = {"linear": best.linear, "chosen_on": chosen_on, "data": self.images.source}
        about["classes"] = len(self.images.classes)
        try:
            write_best_feature(folder, self.model, best.depth, best.pool, **about)
        except OSError as error:
            warnings.warn(f"{folder} cannot be written to, so the best feature is not kept: {error}", stacklevel=2)

    def _finetune(self, out: str | Path | None) -> None:
        with self._timed("finetune", out) as entry:
            arguments = self.images, self.form, self.runtime, self.options.finetune
            tops, network = finetune(self.model, *arguments, self.options.num_workers, self.options.seed)
            entry |= tops
            if out is not None and self.runtime.rank == 0:
                entry["saved"] = str(save_backbone(network, Path(out) / "finetuned", overwrite=True))

    @contextmanager
    def _timed(self, protocol: str, out: str | Path | None) -> Any:
        start, entry = time.perf_counter(), cast(dict[str, Any], {})
        yield entry
        if self.runtime.rank:
            return
        entry |= {
            "options": self._relevant(protocol),
            "seed": self.options.seed,
            "seconds": round(time.perf_counter() - start, 3),
            "feature_seconds": round(self.seconds, 3),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **environment(self.runtime),
        }
        self.results["protocols"][protocol] = entry
        if out is not None:
            write_results(self.results, out)

    def _relevant(self, protocol: str) -> dict[str, Any]:
        options = asdict(self.options)
        shared = ["model_args", "weights", "batch_size", "untrained"]
        names = {
            "knn": ["k", "temperature", "depth", "pool"],
            "linear": ["depth", "pool", "linear"],
            "attentive": ["attentive"],
            "finetune": ["finetune"],
            "head": [],
            "readout": ["k", "temperature", "concat", "floor", "linear"],
        }[protocol]
        form = {"crop_pct": self.form.crop_pct, "crop_mode": self.form.crop_mode}
        chosen = {name: options[name] for name in names + shared} | form
        if "linear" in chosen:
            chosen["linear"] |= {"solver": self.solver}
        if protocol == "attentive":
            chosen["attentive"] |= {"depth": self.attentive_depth}
        return chosen

    def _features(self, model: nn.Module, wanted: list[Pair]) -> tuple[DepthFeatures, DepthFeatures] | None:
        description = weights_hash(model), model_description(model)
        both = []
        for split in ("train", "val"):
            key = *description, self.results["data"]["files_sha256"][split], repr(self.form), self.runtime.precision
            labels = torch.tensor(self.images.split(cast(Split, split)).dataset.targets)
            cache = FeatureCache(key, labels, int(model.num_features)) if self.options.cache else None  # type: ignore
            both.append(self._one(model, cast(Split, split), wanted, cache))
        train, val = both
        return None if train is None or val is None else (train, val)

    def _one(
        self, model: nn.Module, split: Split, wanted: list[Pair], cache: FeatureCache | None
    ) -> DepthFeatures | None:
        names = ["labels", *(f"{depth}/{pool}" for depth, pool in wanted)]
        found = cache.read(names) if cache is not None and self.runtime.rank == 0 else {}
        missing = [pair for pair in wanted if f"{pair[0]}/{pair[1]}" not in found]
        if "labels" not in found:
            missing = wanted
        missing = self.runtime.from_zero(missing)
        if missing:
            images = self.images.split(split)
            loader: Iterable[Any] = ordered_loader(
                images, self.form.evaluation(), self.runtime, self.options.batch_size, self.options.num_workers
            )
            if self.runtime.progress:
                loader = track(loader, f"features of {split}")
            share = len(range(self.runtime.rank, len(images), self.runtime.world_size))
            device, precision = self.runtime.device, self.runtime.precision
            local = extract_depth_features(model, loader, device, missing, share, precision)
            whole = gather_features(local, len(images), self.runtime.device)
            if whole is None:
                return None
            new = {f"{d}/{p}": value for d, pools in whole.features.items() for p, value in pools.items()}
            new |= {f"{depth}/tokens": value for depth, value in whole.tokens.items()}
            new["labels"] = whole.labels
            if cache is not None:
                cache.write(new)
                new |= cache.read(new)  # mapped from the disk: what memory held of them is free again
            found |= new
        if self.runtime.rank:
            return None
        return from_pairs({pair: found[f"{pair[0]}/{pair[1]}"] for pair in wanted}, found["labels"])
