"""Networks for use without this package: ONNX, and torch.export."""

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nepa_plugin.checkpoints.errors import CheckpointError
from nepa_plugin.runtime.files import whole_file

SUFFIXES = {".onnx": "ONNX", ".pt2": "torch.export"}
#: Largest difference from PyTorch that an export may have, relative to the largest output.
TOLERANCE = 1e-4


def check_exportable(path: str | Path, batch: int | None) -> None:
    """Check what can be checked before anything is built.

    Args:
        path: Where the network is to be written.
        batch: Images per call; ``None`` for any number.

    Raises:
        ValueError: If the suffix is none of those known, the batch is not positive, or a package that ONNX needs is not
            installed.
        FileExistsError: If the file exists.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        kinds = ", ".join(f"{suffix} ({kind})" for suffix, kind in SUFFIXES.items())
        raise ValueError(f"{path}: the name must end with {kinds.replace(', ', ' or ')}.")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}.")
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another name.")
    if path.suffix == ".onnx":
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"Exporting to ONNX needs {error.name}: pip install onnx onnxscript onnxruntime."
            ) from error


def export_model(model: Any, path: str | Path, batch: int | None = None) -> float:
    """Write a network as a graph that takes images and returns what the network does, and compare the two.

    Args:
        model: A timm model: a backbone, which returns tokens (B, T, D), or a classifier, which returns logits.
        path: ``.onnx``, whose input is called ``images`` and whose output ``tokens`` or ``logits``, or ``.pt2``, which
            ``torch.export.load`` reads.
        batch: Images per call; any number by default.

    Returns:
        The largest difference from PyTorch on random images, relative to the largest output.

    Raises:
        ValueError: If the file cannot be written so, as :func:`check_exportable` says.
        CheckpointError: If the exported network computes something else.
    """
    path = Path(path)
    check_exportable(path, batch)
    model = model.to("cpu").eval()
    height, width = model.patch_embed.img_size
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> Tensor:
        return torch.randn(count, model.patch_embed.proj.in_channels, height, width, generator=generator)

    # a batch of one would be taken for a size that never changes
    example, inputs = images(batch or 2), [images(count) for count in ([batch] if batch else [1, 2, 5])]
    shapes = None if batch else ({0: torch.export.Dim("batch", min=1)},)
    output = "logits" if getattr(model, "num_classes", 0) else "tokens"
    with torch.no_grad(), _quiet(), whole_file(path) as part:
        if path.suffix == ".pt2":
            program = io.BytesIO()
            torch.export.save(torch.export.export(model, (example,), dynamic_shapes=shapes), program)
            part.write_bytes(program.getvalue())
            exported: nn.Module = torch.export.load(program).module()
            found = [exported(x) for x in inputs]
        else:
            torch.onnx.export(
                model,
                (example,),
                str(part),
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=["images"],
                output_names=[output],
                external_data=False,
            )
            found = _by_onnxruntime(part, inputs)
        wanted = [model(x) for x in inputs]
        scale = max(float(y.abs().max()) for y in wanted)
        difference = max(float((x - y).abs().max()) for x, y in zip(found, wanted, strict=True)) / max(scale, 1e-12)
        if not difference <= TOLERANCE:
            raise CheckpointError(f"The exported network is {difference:.2g} of its largest output off PyTorch's.")
    return difference


def _by_onnxruntime(path: Path, inputs: list[Tensor]) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(session.run(None, {"images": images.numpy()})[0]) for images in inputs]


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep the exporter's reports of its stages down."""
    logger = logging.getLogger("onnxscript")
    level, logger.level = logger.level, logging.ERROR
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.level = level
