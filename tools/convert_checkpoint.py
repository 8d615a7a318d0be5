"""Convert a checkpoint between the timm folder and the published NEPA layout.

python tools/convert_checkpoint.py someone/nepa-checkpoint out/ --layout timm
"""

from nepa_plugin.commands.convert_checkpoint import main

if __name__ == "__main__":
    main()
