"""Write the embedded segmentation demo: scenes of handwritten digits with a class per pixel, in ADE20K's layout.

python tools/make_digit_scenes.py data/digit_scenes
"""

import argparse
import sys

from nepa_plugin.segmentation.scenes import digit_scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", help="folder to create: images/ and annotations/, each with training/ and validation/"
    )
    parser.add_argument("--training", type=int, default=600, help="number of training scenes")
    parser.add_argument("--validation", type=int, default=100, help="number of validation scenes")
    parser.add_argument("--seed", type=int, default=0, help="of the composition")
    args = parser.parse_args()
    try:
        print(f"Wrote {digit_scenes(args.folder, args.training, args.validation, seed=args.seed)}")
    except (ValueError, FileExistsError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
