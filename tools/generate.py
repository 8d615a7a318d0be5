"""Let a NEPA backbone go on with images of which it sees the first patches, and draw what it imagines.

python tools/generate.py runs/x/backbone --data digits --out generated
"""

from nepa_plugin.commands.generate import main

if __name__ == "__main__":
    main()
