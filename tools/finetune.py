"""Fine-tune a backbone on a folder of images with one sub-folder per class.

python tools/finetune.py CHECKPOINT --data FOLDER --config lightly_configs/finetune/vit_b_imagenet.yaml
"""

from nepa_plugin.commands.finetune import main

if __name__ == "__main__":
    main()
