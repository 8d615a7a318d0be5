"""Pack an image folder into shards for data.train_shards: tar files in random order, and index.json.

nepa shards /data/imagenet/train /data/imagenet_shards
nepa shards --index 'https://HOST/other-{000000..000146}.tar' index.json

The second form counts the images of shards that something else has made; put its file beside them.
"""

from nepa_plugin.commands.boundary import errors_in_one_line
from nepa_plugin.commands.naming import command_parser
from nepa_plugin.data.files import MAX_PIXELS
from nepa_plugin.data.packing import index_shards, make_shards


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: Command line arguments; ``sys.argv`` by default.

    Raises:
        SystemExit: With status 2 and one line on stderr if the input is bad.
    """
    parser = command_parser("shards", __doc__, args)
    parser.add_argument("folder", help="images: one sub-folder per class, or flat; with --index, the shards")
    parser.add_argument("out", help="folder to create; with --index, the file to write")
    parser.add_argument("--index", action="store_true", help="write the index of existing shards")
    parser.add_argument("--images_per_shard", type=int, default=1000, help="images in each shard")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--skip_bad", action="store_true", help="leave out files that are no readable images")
    parser.add_argument(
        "--max_image_pixels", type=int, default=MAX_PIXELS, help="of an image; one with more is no readable one"
    )
    parser.add_argument("--allow_pipe", action="store_true", help="with --index: run shards that are pipe: commands")
    given = parser.parse_args(args)
    with errors_in_one_line():
        if given.index:
            index = index_shards(given.folder, given.out, given.allow_pipe)
        else:
            index = make_shards(
                given.folder, given.out, given.images_per_shard, given.seed, given.skip_bad, given.max_image_pixels
            )
        shards, classes = len(index["shards"]), len(index["classes"])
        print(f"{given.out}: {index['images']} images in {shards} shard(s), {classes} classes")
