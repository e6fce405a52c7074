"""From an image of any size to what a backbone takes, and from maps of that back to the image."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from fastflow_jax import tiles
from fastflow_jax.data.pipeline import as_input
from fastflow_jax.data.transforms import Placement, seen_part


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """An image as a backbone takes it: one input, or k, one a tile."""

    name: str
    size: tuple[int, int]  # (height, width) of the image
    images: np.ndarray  # float32 [k, H, W, 3], normalised
    valid: np.ndarray | None  # bool [k, H, W], see `Batch.valid`
    placed: tuple[Placement, ...]  # where each tile lies in its input
    where: list[tuple[slice, slice]]  # where each tile lies in the image


def cut(image: np.ndarray, name: str, config, spec, *, tile: bool) -> Inputs:
    """The inputs of an image uint8 [H, W, 3].

    Args:
      image: as it was decoded.
      name: what it is called.
      config: filled, of the detector.
      spec: of its backbone.
      tile: cut it into tiles of the input's size if it is larger.
    """
    size, height_width = tuple(config.image_size), image.shape[:2]
    where = [(slice(0, height_width[0]), slice(0, height_width[1]))]
    if tile and (height_width[0] > size[0] or height_width[1] > size[1]):
        # Of a narrow image tiles are no wider than it is, and "crop" would cut them off once more.
        shrunk = min(1, *np.divide(height_width, size)) if config.data.resize == "crop" else 1
        where = tiles.places(height_width, tuple(max(1, int(side * shrunk)) for side in size))
    how = {"image_size": size, "mean": spec.mean, "std": spec.std}
    parts = [as_input(image[w], resize_by=config.data.resize, **how) for w in where]
    images, valid, placed = zip(*parts, strict=True)
    valid = None if valid[0] is None else np.stack(valid)
    return Inputs(name, height_width, np.stack(images), valid, placed, where)


def whole_map(inputs: Inputs, maps: Sequence[np.ndarray]) -> np.ndarray:
    """Maps of the inputs [k, h, w] -> the map of the image, float32 [H, W]."""
    of_tiles = [
        _at_own_size(m, placed, tuple(part.stop - part.start for part in where))
        for m, placed, where in zip(maps, inputs.placed, inputs.where, strict=True)
    ]
    if len(of_tiles) == 1:
        return of_tiles[0]
    return tiles.blend(of_tiles, inputs.where, inputs.size)


def whole_box(inputs: Inputs, box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """A box (top, left, bottom, right) of the one input, in pixels of the image."""
    (placed,) = inputs.placed
    sides = []
    for i, at in enumerate(box):
        place, crop = placed.place[i % 2], placed.crop[i % 2]
        resized = np.clip(at, place.start, place.stop) - place.start + crop.start
        sides.append(round(int(resized) * inputs.size[i % 2] / placed.resized[i % 2]))
    return tuple(sides)


def _at_own_size(anomaly_map: np.ndarray, placed: Placement, size: tuple[int, int]) -> np.ndarray:
    """The map of an input as that of its image; what the input cut off has the lowest value."""
    part = anomaly_map[placed.place]
    whole = np.full(size, part.min(), np.float32)
    seen = seen_part(whole, placed)  # a view
    stretched = Image.fromarray(part).resize(seen.shape[::-1], Image.Resampling.BILINEAR)
    seen[:] = np.asarray(stretched)
    return whole
