"""Classify images with a fine-tuned network: the most probable classes of each, as a table, a CSV and a picture.

python tools/predict.py runs/mine/finetuned photo.jpg holiday/ --out predictions
"""

from nepa_plugin.commands.predict import main

if __name__ == "__main__":
    main()
