"""Convert a checkpoint between a timm folder, the published NEPA layout, and an mmengine file.

python tools/convert_checkpoint.py someone/nepa-checkpoint out/ --layout timm
"""

from nepa_plugin.commands.convert_checkpoint import main

if __name__ == "__main__":
    main()
