"""Writes backbones.npz: timm's maps for seeded numbers, a few channels and places of each.

python tests/goldens/make_backbones.py [NAME ...]     # needs torch, torchvision and timm

With names, the maps of other backbones stay as they are.
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "backbones"), str(HERE.parent)]

from timm_oracle import (  # noqa: E402
    compared_layers,
    sample,
    seeded_images,
    seeded_state,
    timm_maps,
)

from fastflow_jax.backbones import BACKBONES  # noqa: E402


def sizes(spec) -> list[tuple[int, int]]:
    """The size that the weights are for, and one that is not square."""
    if not hasattr(spec.architecture, "native"):
        return [(256, 256), (192, 320)]
    stride = spec.maps[spec.layers[0]][1]
    return [(spec.architecture.native,) * 2, (10 * stride, 16 * stride)]


if __name__ == "__main__":
    names = sys.argv[1:] or [name for name in BACKBONES if name != "pixels"]
    goldens = dict(np.load(HERE / "backbones.npz")) if sys.argv[1:] else {}
    for name in names:
        spec = BACKBONES[name]
        layers = compared_layers(name)
        state = seeded_state(name, layers)
        for height, width in sizes(spec):
            maps = timm_maps(name, state, seeded_images(height, width), layers)
            print(name, height, width, flush=True)
            for layer, picked in zip(layers, sample(maps), strict=True):
                goldens[f"{name}/{height}x{width}/{layer}"] = picked.astype(np.float32)
    np.savez_compressed(HERE / "backbones.npz", **goldens)
