"""Write a backbone or a classifier for use without this package: as ONNX, or as a torch.export program.

python tools/export.py runs/mine/finetuned classifier.onnx
"""

from nepa_plugin.commands.export import main

if __name__ == "__main__":
    main()
