"""Evaluate a frozen backbone: kNN and linear probe at every depth, beside the untrained network.

python tools/evaluate.py runs/x/backbone --data digits
python tools/evaluate.py runs/x/backbone --data /data/images        # holds train/ and val/, a sub-folder per class
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from nepa_plugin.checkpoints import load_backbone, untrained_like
from nepa_plugin.data import evaluation_loaders
from nepa_plugin.evaluation import extract_depth_features, readout, readout_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", help="timm folder, published NEPA folder, hub id, or .ckpt of a pretraining run")
    parser.add_argument("--data", required=True, help="'digits', or a folder with train/ and val/")
    parser.add_argument("--protocol", choices=["readout"], default="readout")
    parser.add_argument("--crop-pct", type=float, default=None, help="centre crop over resized side (the model's own)")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--k", type=int, default=20, help="neighbours of kNN")
    parser.add_argument("--out", type=Path, help="folder for readout.json")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = load_backbone(args.backbone)
        loaders = evaluation_loaders(args.data, model, args.batch_size, args.crop_pct)
        results = {}
        for name, network in (("untrained", untrained_like(model)), ("pretrained", model)):
            train, val = (extract_depth_features(network, loader, device) for loader in loaders)
            results[name] = readout(train, val, k=args.k)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    Console(width=120).print(readout_table(results))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        rows = {name: [asdict(row) for row in rows] for name, rows in results.items()}
        (args.out / "readout.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
