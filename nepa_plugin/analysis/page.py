"""One self-contained HTML page in which a click on a patch shows its maps."""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nepa_plugin.analysis.look import Look, PatchMap
from nepa_plugin.runtime.files import whole_file


def write_page(looks: Sequence[Look], path: Path, title: str, about: str) -> None:
    """Write the page; it holds all that it shows, and fetches nothing.

    Args:
        looks: Of images with the same maps.
        path: HTML file to write.
        title: Of the page.
        about: A sentence below it.
    """
    from matplotlib import colormaps

    lut = (np.asarray(colormaps["viridis"](np.arange(256)))[:, :3] * 255).round().astype(np.uint8)
    data = {"colours": _text(lut.tobytes()), "images": [_image(one) for one in looks]}
    template = Template((Path(__file__).with_name("page.html")).read_text(encoding="utf-8"))
    # in a script element, `</` could end it
    content = json.dumps(data).replace("</", "<\\/")
    page = template.substitute(title=html.escape(title), about=html.escape(about), data=content)
    with whole_file(path) as part:
        part.write_text(page, encoding="utf-8")


def _image(one: Look) -> dict[str, Any]:
    return {
        "name": one.name,
        "rows": one.grid[0],
        "columns": one.grid[1],
        "height": one.pixels.shape[1],
        "width": one.pixels.shape[2],
        "picture": "data:image/png;base64," + _text(png(one.pixels)),
        "maps": [_map(each) for each in one.maps],
    }


def _map(one: PatchMap) -> dict[str, Any]:
    """Return a map in bytes: each row from its smallest value, 0, to its largest, 255."""
    rows = torch.atleast_2d(one.values.float().cpu())
    known = rows.isfinite()
    low = torch.where(known, rows, torch.inf).amin(dim=1)
    high = torch.where(known, rows, -torch.inf).amax(dim=1)
    scaled = (rows - low[:, None]) / (high - low).clamp_min(1e-12)[:, None]
    levels = torch.where(known, scaled, 0.0).mul(255).round().to(torch.uint8)
    return {
        "group": one.group,
        "name": one.name,
        "by_patch": one.by_patch,
        "values": _text(levels.numpy().tobytes()),
        "low": _text(low.numpy().tobytes()),
        "high": _text(high.numpy().tobytes()),
    }


def png(pixels: Tensor) -> bytes:
    """Return a PNG file of pixels (3, H, W) from 0 to 1."""
    buffer = io.BytesIO()
    Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
