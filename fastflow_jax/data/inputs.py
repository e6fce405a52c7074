"""Conversion of images of any size to model inputs, and of anomaly maps back to image size."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from fastflow_jax.data.pipeline import as_input, check_region, kinds_of_pixels, nothing_counts
from fastflow_jax.data.tiling import OVERLAP, Blender, Place, Places, Tiling
from fastflow_jax.data.tiling import places as tiles_of
from fastflow_jax.data.transforms import Placement, counted, resize, resize_mask, seen_part
from fastflow_jax.errors import InputError


class Part(NamedTuple):
    """Model input of an image or of one of its tiles."""

    image: np.ndarray  # uint8 [H, W, 3]; 0 in padding
    valid: np.ndarray | None  # [H, W], which pixels count, see `pipeline.as_input`
    placed: Placement  # of the tile in the input
    where: Place  # in the image


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """Model inputs of an image: one, or one per tile."""

    name: str
    size: tuple[int, int]  # (height, width) of the image that is cut
    where: list[Place]  # of all tiles, or of the image
    own_size: tuple[int, int]  # of the image before it is resized, see `Tiling.resolution`
    # To iterate once; tiles are cut on demand. Without tiles in which no pixel counts.
    parts: Iterable[Part]
    n: int  # number of parts
    statistics: Places | None = None  # by which scores and maps of tiles are standardised
    region: np.ndarray | None = None  # bool [H, W], True in pixels that count; None if all do


def cut(
    image: np.ndarray,
    name: str,
    image_size: tuple[int, int],
    resize_by: str,
    tiling: Tiling | None = None,
    statistics: Places | None = None,
    region: np.ndarray | None = None,
) -> Inputs:
    """Returns the model inputs of an image.

    Args:
        image: uint8 [H, W, 3].
        name: name of the image in messages and results.
        image_size: (height, width) of model inputs.
        resize_by: "square", "crop" or "pad", see `transforms.placement`.
        tiling: how a larger image is cut into tiles; None: it is one input.
        statistics: by which scores and maps of tiles are standardised, if they are.
        region: bool [H, W], True in pixels that count; None if all do, as in images whose
            resolution is changed.

    Raises:
        InputError: the tiles are at other places than those of the statistics, or see
            `pipeline.check_region`.
    """
    own_size = image.shape[0], image.shape[1]
    size, where = own_size, [(slice(0, own_size[0]), slice(0, own_size[1]))]
    if tiling is not None:
        size = tiling.size(own_size)
        image = resize(image, size)
        where = places(size, tiling, resize_by)
    if statistics is not None and not statistics.fits(where):
        raise InputError(
            f"{name} has {own_size[1]} x {own_size[0]} pixels. This detector was trained with "
            "config.data.aligned, so images must have the size of the training images."
        )

    def part(span: Place) -> Part:
        inside = None if region is None else region[span]
        return Part(*as_input(image[span], image_size, resize_by, inside), span)

    if len(where) == 1:
        whole = part(where[0])
        check_region(whole.valid, name)
        return Inputs(name, size, where, own_size, (whole,), 1, statistics, region)
    used = where
    if region is not None:
        kinds = (kinds_of_pixels(region[span], image_size, resize_by) for span in where)
        used = [span for span, of_tile in zip(where, kinds, strict=True) if counted(of_tile).any()]
    if not used:
        raise nothing_counts(name)
    return Inputs(name, size, where, own_size, map(part, used), len(used), statistics, region)


def places(
    size: tuple[int, int], tiling: Tiling, resize_by: str, overlap: float = OVERLAP
) -> list[Place]:
    """Returns the tiles of an image, see `tiling.places`.

    Args:
        size: (height, width) of the image after it is resized.
        tiling: how it is cut.
        resize_by: how tiles become model inputs, see `cut`.
        overlap: smallest fraction of a tile shared with the next one.
    """
    (height, width), (rows, columns) = size, tiling.side
    if height <= rows and width <= columns:
        return [(slice(0, height), slice(0, width))]
    # In a narrow image tiles are as narrow as the image, and "crop" would crop them again.
    shrunk = min(1, height / rows, width / columns) if resize_by == "crop" else 1
    side = max(1, int(rows * shrunk)), max(1, int(columns * shrunk))
    return tiles_of(size, side, overlap)


def stacked(parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns images, uint8 [B, H, W, 3], and their `Part.valid` [B, H, W], or None."""
    images, valid, *_ = zip(*parts, strict=True)
    return np.stack(images), None if valid[0] is None else np.stack(valid)


class Outputs:
    """Score, log-likelihood and anomaly map of an image, accumulated over its parts."""

    def __init__(self, inputs: Inputs):
        self.name = inputs.name
        self.score = -np.inf  # maximum over the parts
        self.distance: float | None = None  # to the training images; None for several parts
        self.product = 0  # index of the product, see `Products`
        self.is_known = True  # whether it is one of the products
        self.region = inputs.region  # bool [H, W], True in pixels that count; None if all do
        self._missing = self._n = inputs.n
        self._own_size, self._statistics = inputs.own_size, inputs.statistics
        self._likelihoods: float | None = 0.0
        self._blender = Blender(inputs.size, inputs.where)

    def add(
        self,
        part: Part,
        score: np.ndarray,
        anomaly_map: np.ndarray,
        log_likelihood: np.ndarray | None = None,
        distance: np.ndarray | None = None,
        product: np.ndarray | None = None,
        is_known: np.ndarray | None = None,
        region: np.ndarray | None = None,
    ) -> None:
        """Adds the result of one part.

        Args:
          part: of the image.
          score: [].
          anomaly_map: [h, w].
          log_likelihood: [], or None if the detector has none.
          distance: to the training images [], or None if it is unknown.
          product: index of the product [], or None if there is one only.
          is_known: whether it is one of the products [], or None.
          region: bool [h, w], pixels that count, if the detector finds them in the whole image.
        """
        if self._statistics is not None:
            score, anomaly_map = self._statistics.standardise(part.where, score, anomaly_map)
        self.score = float(np.maximum(self.score, score))  # NaN stays
        if log_likelihood is None or self._likelihoods is None:
            self._likelihoods = None
        else:
            self._likelihoods += float(log_likelihood)
        if distance is not None and self._n == 1:
            self.distance = float(distance)
        if product is not None:
            self.product, self.is_known = int(product), bool(is_known)
        if region is not None:
            self.region = _region_at_own_size(region, part)
        self._blender.add(at_own_size(anomaly_map, part.placed, part.where), part.where)
        self._missing -= 1

    @property
    def is_complete(self) -> bool:
        """Whether all parts have been added."""
        return self._missing == 0

    @property
    def log_likelihood(self) -> float | None:
        """Mean over the parts, or None if a part has none."""
        return None if self._likelihoods is None else self._likelihoods / self._n

    @property
    def anomaly_map(self) -> np.ndarray:
        """Anomaly map of the image, float32 [H, W]; outside of `region` its lowest value there."""
        found = _stretched(self._blender.result(), self._own_size)
        return (
            found if self.region is None else np.where(self.region, found, found[self.region].min())
        )


def at_own_size(anomaly_map: np.ndarray, placed: Placement, where: Place) -> np.ndarray:
    """Resizes the map of an input to its tile; pixels outside the input get the minimum.

    Args:
        anomaly_map: float32 [H, W] of the input.
        placed: placement of the tile in the input.
        where: the tile in its image.

    Returns:
        float32 [h, w] of the size of the tile.
    """
    inside = anomaly_map[placed.place]
    whole = np.full([span.stop - span.start for span in where], inside.min(), np.float32)
    seen = seen_part(whole, placed)  # a view
    seen[:] = _stretched(inside, (seen.shape[0], seen.shape[1]))
    return whole


def _stretched(anomaly_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if anomaly_map.shape == size:
        return anomaly_map
    height, width = size
    pillow = Image.fromarray(anomaly_map)
    return np.asarray(pillow.resize((width, height), Image.Resampling.BILINEAR))


def _region_at_own_size(region: np.ndarray, part: Part) -> np.ndarray:
    """Resizes a region of an input, bool [h, w], to its image; False outside of the input."""
    inside = region[part.placed.place]
    whole = np.zeros([span.stop - span.start for span in part.where], bool)
    seen = seen_part(whole, part.placed)  # a view
    seen[:] = resize_mask(inside, seen.shape)
    return whole if whole.any() else ~whole  # a small image may have no pixel of a thin region
