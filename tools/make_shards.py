"""Pack an image folder into shards for data.train_shards: tar files in random order, and index.json.

python tools/make_shards.py /data/imagenet/train /data/imagenet_shards
python tools/make_shards.py --index 'https://HOST/other-{000000..000146}.tar' index.json

The second form counts the images of shards that something else has made; put its file beside them.
"""

import argparse
import sys

from nepa_plugin.data.packing import index_shards, make_shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="images: one sub-folder per class, or flat; with --index, the shards")
    parser.add_argument("out", help="folder to create; with --index, the file to write")
    parser.add_argument("--index", action="store_true", help="write the index of existing shards")
    parser.add_argument("--images_per_shard", type=int, default=1000, help="images in each shard")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--skip_bad", action="store_true", help="leave out files that are no readable images")
    args = parser.parse_args()
    try:
        if args.index:
            index = index_shards(args.folder, args.out)
        else:
            index = make_shards(args.folder, args.out, args.images_per_shard, args.seed, args.skip_bad)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{args.out}: {index['images']} images in {len(index['shards'])} shard(s), {len(index['classes'])} classes")


if __name__ == "__main__":
    main()
