"""Evaluate a backbone with one or several protocols; prints tables and extends DIR/results.json.

python tools/evaluate.py runs/x/backbone --data digits --protocol knn,linear,readout --out runs/x
"""

from nepa_plugin.commands.evaluate import main

if __name__ == "__main__":
    main()
