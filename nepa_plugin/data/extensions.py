"""What an image file is called: one definition for pretraining, evaluation and segmentation."""

#: Endings of image files, in small letters; their case does not count.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
