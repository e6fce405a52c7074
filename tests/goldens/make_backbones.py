"""Writes backbones.npz: timm's maps for seeded numbers, a few channels and places of each.

python tests/goldens/make_backbones.py        # needs torch, torchvision and timm
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "backbones"), str(HERE.parent)]

from timm_oracle import sample, seeded_images, seeded_state, timm_maps  # noqa: E402

from fastflow_jax.backbones import BACKBONES  # noqa: E402


def sizes(spec) -> list[tuple[int, int]]:
    """The size that the weights are for, and one that is not square."""
    if not hasattr(spec.architecture, "native"):
        return [(256, 256), (192, 320)]
    stride = spec.maps[spec.layers[0]][1]
    return [(spec.architecture.native,) * 2, (10 * stride, 16 * stride)]


if __name__ == "__main__":
    goldens = {}
    for name, spec in BACKBONES.items():
        layers = spec.layers
        for height, width in sizes(spec):
            maps = timm_maps(name, seeded_state(name, layers), seeded_images(height, width), layers)
            print(name, height, width)
            for layer, picked in zip(layers, sample(maps), strict=True):
                goldens[f"{name}/{height}x{width}/{layer}"] = picked
    np.savez_compressed(HERE / "backbones.npz", **goldens)
