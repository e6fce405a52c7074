"""From an image of any size to what a backbone takes, and from maps of that back to the image."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from fastflow_jax.data import tiling
from fastflow_jax.data.pipeline import as_input
from fastflow_jax.data.transforms import Placement, seen_part


class Part(NamedTuple):
    """An image or one tile of it, as a backbone takes it."""

    image: np.ndarray  # float32 [H, W, 3], normalised
    valid: np.ndarray | None  # bool [H, W], see `Batch.valid`
    placed: Placement  # where the part lies in the input
    where: tuple[slice, slice]  # where it lies in the image


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """An image as a backbone takes it: one input, or k, one a tile."""

    name: str
    size: tuple[int, int]  # (height, width) of the image
    where: list[tuple[slice, slice]]  # of all parts
    parts: Iterable[Part]  # to be gone through once: tiles are cut when they are asked for


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
        where = tiling.places(height_width, tuple(max(1, int(side * shrunk)) for side in size))
    how = {"mean": spec.mean, "std": spec.std, "resize_by": config.data.resize}
    part = functools.partial(_part, image, image_size=size, **how)
    parts = (part(where[0]),) if len(where) == 1 else map(part, where)
    return Inputs(name, height_width, where, parts)


def stacked(parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray | None]:
    """Images [B, H, W, 3] and what of them is valid, [B, H, W], see `Batch.valid`."""
    images, valid, *_ = zip(*parts, strict=True)
    return np.stack(images), None if valid[0] is None else np.stack(valid)


class Outputs:
    """Score, log-likelihood and anomaly map of an image, collected part by part."""

    def __init__(self, inputs: Inputs):
        self.name = inputs.name
        self.score = -np.inf  # the highest of a part
        self._missing = self._n = len(inputs.where)
        self._likelihoods = 0.0
        self._blender = tiling.Blender(inputs.size, inputs.where)

    def add(
        self, part: Part, score: np.ndarray, anomaly_map: np.ndarray, likelihood: np.ndarray | None
    ) -> None:
        """Adds what a detector gives for one part: score [], map [h, w], log-likelihood []."""
        self.score = float(np.maximum(self.score, score))  # NaN stays
        self._likelihoods = None if likelihood is None else self._likelihoods + float(likelihood)
        self._blender.add(_at_own_size(anomaly_map, part), part.where)
        self._missing -= 1

    @property
    def is_complete(self) -> bool:
        """Whether all parts are added."""
        return self._missing == 0

    @property
    def log_likelihood(self) -> float | None:
        """The mean over the parts."""
        return None if self._likelihoods is None else self._likelihoods / self._n

    @property
    def anomaly_map(self) -> np.ndarray:
        """The map of the image, float32 [H, W]."""
        return self._blender.result()


def _part(image: np.ndarray, where: tuple[slice, slice], **how) -> Part:
    return Part(*as_input(image[where], **how), where)


def _at_own_size(anomaly_map: np.ndarray, part: Part) -> np.ndarray:
    """The map of an input as that of its part; what the input cut off has the lowest value."""
    inside = anomaly_map[part.placed.place]
    size = tuple(span.stop - span.start for span in part.where)
    whole = np.full(size, inside.min(), np.float32)
    seen = seen_part(whole, part.placed)  # a view
    stretched = Image.fromarray(inside).resize(seen.shape[::-1], Image.Resampling.BILINEAR)
    seen[:] = np.asarray(stretched)
    return whole
