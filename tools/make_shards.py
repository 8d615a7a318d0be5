"""Pack an image folder into shards for data.train_shards: tar files in random order, and index.json.

python tools/make_shards.py /data/imagenet/train /data/imagenet_shards
"""

from nepa_plugin.commands.make_shards import main

if __name__ == "__main__":
    main()
