"""Draw what a NEPA backbone expects: similarity of predicted embeddings to all patches of some images.

python tools/visualize.py runs/x/backbone --data digits --out similarity.png
"""

from nepa_plugin.commands.visualize import main

if __name__ == "__main__":
    main()
