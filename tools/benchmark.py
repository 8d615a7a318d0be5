"""Time NEPA's training step beside others, on this machine; prints a table and writes JSON.

python tools/benchmark.py --model base --batch-size 256 --precision bf16-mixed --compile off on
"""

from nepa_plugin.commands.benchmark import main

if __name__ == "__main__":
    main()
