"""Rolling forward with and without kept keys and values: seconds per patch, side by side.

python benchmarks/generation.py --model nepa_vit_base_patch14_224 --known 128 --rounds 3
"""

import argparse
import json
import statistics
import time

import timm
import torch

from nepa_plugin.analysis.generation import CachedPredictor, roll_forward
from nepa_plugin.runtime.provenance import provenance


def without_cache(model: torch.nn.Module, images: torch.Tensor, known: int) -> None:
    """Read everything again for every patch that is rolled forward."""
    with torch.inference_mode():
        embeddings = model.predict_next(images)[0][:, : 1 + known]
        for _ in range(model.patch_embed.num_patches - known):
            expected = CachedPredictor(model, len(images)).read(embeddings)[:, -1:]
            embeddings = torch.cat([embeddings, expected], dim=1)


def main() -> None:
    """Time both in turns, and print the record as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nepa_vit_base_patch14_224")
    parser.add_argument("--known", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(given.model).eval().to(given.device)
    images = torch.randn(given.batch, 3, *model.patch_embed.img_size, device=given.device)
    seconds: dict[str, list[float]] = {"cached": [], "without": []}
    for round_ in range(given.rounds + 1):  # the first warms up
        for name, run in (("cached", roll_forward), ("without", without_cache)):
            start = time.perf_counter()
            run(model, images, given.known)
            if given.device != "cpu":
                torch.cuda.synchronize()
            if round_:
                seconds[name].append((time.perf_counter() - start) / (model.patch_embed.num_patches - given.known))
    ratios = [slow / fast for fast, slow in zip(seconds["cached"], seconds["without"], strict=True)]
    record = vars(given) | {"seconds_per_patch": seconds, "times_as_fast": ratios}
    print(json.dumps(record | provenance(), indent=1))
    print(
        f"{statistics.median(ratios):.1f} times as fast with kept keys and values ({min(ratios):.1f}-{max(ratios):.1f})"
    )


if __name__ == "__main__":
    main()
