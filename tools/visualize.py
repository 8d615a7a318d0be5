"""Look inside a NEPA backbone: what it expects next, what surprises it, what attends to what, and its features.

python tools/visualize.py runs/x/backbone photo.jpg holiday/ --out look
"""

from nepa_plugin.commands.visualize import main

if __name__ == "__main__":
    main()
