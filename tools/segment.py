"""Segment images: a picture of each (image, prediction, label where there is one), and the IoU per class as CSV.

python tools/segment.py mmseg_configs/nepa_vit_b_ade20k.py work_dirs/x/best_mIoU_iter_160000.pth street.jpg
"""

from nepa_plugin.commands.segment import main

if __name__ == "__main__":
    main()
