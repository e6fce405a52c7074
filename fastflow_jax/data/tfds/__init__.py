"""Data sets prepared by tfds: MVTec AD, BTAD, ELPV and CIFAR-10."""
