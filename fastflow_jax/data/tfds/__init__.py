"""Data sets that tfds prepares: MVTec AD, BTAD, ELPV and CIFAR-10."""
