"""Write the embedded segmentation demo: scenes of handwritten digits with a class per pixel, in ADE20K's layout.

python tools/make_digit_scenes.py data/digit_scenes
"""

from nepa_plugin.commands.make_digit_scenes import main

if __name__ == "__main__":
    main()
