"""Pretrain a self-supervised method on a folder of images.

python tools/pretrain.py --config lightly_configs/nepa_vit_b.yaml --data.train_dir /data/imagenet/train
"""

from nepa_plugin.commands.pretrain import main

if __name__ == "__main__":
    main()
