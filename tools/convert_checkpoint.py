"""Convert a checkpoint between the timm folder and the published NEPA layout.

python tools/convert_checkpoint.py someone/nepa-checkpoint out/ --layout timm
python tools/convert_checkpoint.py runs/x/checkpoints/last.ckpt out/ --layout nepa
"""

import argparse
import sys

from nepa_plugin import load_backbone, save_backbone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="timm folder, published NEPA folder, hub id, or .ckpt of a pretraining run")
    parser.add_argument("folder", help="where to write config.json and model.safetensors")
    parser.add_argument("--layout", choices=["timm", "nepa"], default="timm")
    args = parser.parse_args()
    try:
        print(f"Wrote {save_backbone(load_backbone(args.source), args.folder, layout=args.layout)}")
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
