"""Writes backbones.npz: timm's maps for seeded numbers, a few channels and places of each.

python tests/goldens/make_backbones.py        # needs torch, torchvision and timm
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "backbones"))

from timm_oracle import sample, seeded_images, seeded_state, timm_maps  # noqa: E402

from fastflow_jax.backbones import BACKBONES  # noqa: E402

CONVOLUTIONAL = ((256, 256), (192, 320))
CASES = {
    "resnet18": CONVOLUTIONAL,
    "wide_resnet50_2": CONVOLUTIONAL,
    "tf_efficientnet_lite0": CONVOLUTIONAL,
}

if __name__ == "__main__":
    goldens = {}
    for name, sizes in CASES.items():
        layers = BACKBONES[name].layers
        for height, width in sizes:
            maps = timm_maps(name, seeded_state(name, layers), seeded_images(height, width), layers)
            for layer, picked in zip(layers, sample(maps), strict=True):
                goldens[f"{name}/{height}x{width}/{layer}"] = picked
    np.savez_compressed(HERE / "backbones.npz", **goldens)
