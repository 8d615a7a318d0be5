"""Train several methods on equal terms, evaluate them the same way, and write a report.

python tools/compare.py lightly_configs/nepa_digits.yaml lightly_configs/mae_digits.yaml --data digits --seeds 0 1
"""

from nepa_plugin.commands.compare import main

if __name__ == "__main__":
    main()
