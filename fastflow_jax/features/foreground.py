"""Foreground: the region of interest of each image, found by its features.

Features of an object and of its background differ more than those within either, so the first
principal component of the features of all training images tells them apart, as in AnomalyDINO
(Damm et al., arXiv 2405.14529). Here the threshold is that of Otsu (IEEE Transactions on Systems,
Man, and Cybernetics 9, 1979), and the background is the side that most of the borders of the images
are on.
"""

from collections.abc import Sequence
from typing import Any, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import scipy

from fastflow_jax.features.extract import (
    Features,
    Part,
    TrainingFeatures,
    channel_moments,
    in_batches,
    inside,
)
from fastflow_jax.state import Slot, State, check

_STRIDE = 16  # pixels per location of the map that is used, or as near as possible
# Share of the variance between the two sides of the threshold; that of a uniform distribution. A
# foreground has a higher one. It was .82 to .86 on three sets of objects, and .72 on a texture.
_SEPARATION = 0.75
_BORDER = 2 / 3  # largest share of foreground at the border of the map, over that of the inside
_COARSE = 12  # locations on the shorter side of a map, below which projections are not averaged
_BINS = 256  # of the histogram of Otsu's threshold
_BATCH = 32  # images at a time

Array = jax.Array | np.ndarray


class Foreground(flax.struct.PyTreeNode):
    """Finds the foreground of an image by the projection of its features on one direction."""

    mean: Array  # float32 [C], of the features
    direction: Array  # float32 [C]; the foreground has the higher projections
    threshold: Array  # float32 [], of projections
    # float32 [h, w], share of the training images with foreground in a location. Where it is
    # above half, new images have foreground too: a missing part looks like background.
    usual: Array

    @classmethod
    def fit(cls, train: TrainingFeatures, size: tuple[int, int]) -> "Foreground | None":
        """Fits the direction and the threshold.

        Args:
          train: features of the training images, which are read twice.
          size: (H, W) of model inputs.

        Returns:
          None if no foreground can be separated, as in images of textures.
        """
        ((mean, covariance),) = channel_moments(_one_map(part, size) for part in train.parts())
        std = np.sqrt(np.diag(covariance))
        std[std == 0] = 1
        _, vectors = np.linalg.eigh(covariance / np.outer(std, std))
        direction = vectors[:, -1] / std
        center, direction = (array.astype(np.float32) for array in (mean, direction))
        draft = cls(center, direction, np.zeros((), np.float32), np.zeros((1, 1), np.float32))
        run = jax.jit(_projections)
        parts = (_one_map(part, size) for part in train.parts())
        found = [(np.asarray(run(draft, *part)), _seen(part)) for part in parts]
        projections, seen = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        threshold, separation = _otsu(projections[seen])
        above, border = projections > threshold, _border(seen)
        if 2 * above[border].mean() > 1:
            draft, threshold = draft.replace(direction=-draft.direction), -threshold
            above = -projections > threshold
        rest = above[seen & ~border]
        is_framed = len(rest) and above[border].mean() <= _BORDER * rest.mean()
        if separation <= _SEPARATION or not is_framed:
            return None
        usual = (above & seen).mean(0, dtype=np.float32)
        return draft.replace(threshold=np.float32(threshold), usual=usual)

    def state_dict(self) -> dict[str, np.ndarray]:
        """The fields by name, for `from_state`."""
        return {name: np.asarray(value) for name, value in vars(self).items()}

    @classmethod
    def from_state(cls, state: State) -> "Foreground":
        """The inverse of `state_dict`; raises InputError if it has other arrays."""
        channels = state["mean"].size if "mean" in state else None
        slots = {"mean": Slot((channels,)), "direction": Slot((channels,))}
        check(state, slots | {"threshold": Slot(()), "usual": Slot((None, None))})
        return cls(**state)


def region(
    foreground: Foreground | None, features: Any, valid: Any, size: tuple[int, int]
) -> jax.Array | None:
    """The pixels of images that count, bool [B, H, W], as a pure function.

    Args:
      foreground: None if the region of interest is not found by features.
      features: [B, h, w, C] per scale.
      valid: bool [B, H, W], False in pixels that do not count anyway; None if there are none.
      size: (H, W) of model inputs.

    Returns:
      The pixels of `valid` in the foreground; all of them in images without foreground.
    """
    if foreground is None:
        return valid
    (maps,), _ = _one_map((features, None), size)
    values = _projections(foreground, (maps,), valid)
    shape = (values.shape[0], *size)
    found = jax.image.resize(values, shape, "linear") > foreground.threshold
    usual = jax.image.resize(jnp.asarray(foreground.usual), size, "linear") > 0.5
    found = found | usual
    if valid is not None:
        found = found & valid
    is_empty = ~found.any((1, 2), keepdims=True)
    return found | (is_empty if valid is None else is_empty & valid)


def regions(
    foreground: Foreground, features: Features, valid: np.ndarray | None, size: tuple[int, int]
) -> np.ndarray:
    """`region` of any number of images, in batches."""

    def of_batch(part: Part) -> np.ndarray:
        (maps,), seen = _one_map(part, size)
        return np.asarray(_compiled(foreground, (np.asarray(maps),), seen, size=tuple(size)))

    return in_batches(of_batch, (features, valid), _BATCH)


_compiled = jax.jit(region, static_argnames="size")


def _one_map(part: Part, size: tuple[int, int]) -> Part:
    """The first map whose stride is nearest to `_STRIDE`, and which pixels count."""
    maps, valid = part
    strides = [size[0] / m.shape[1] for m in maps]
    best = np.argmin([abs(np.log2(stride / _STRIDE)) for stride in strides])
    return (maps[int(best)],), valid


def _projections(foreground: Foreground, maps: Sequence[Any], valid: Any) -> jax.Array:
    """Projections of features on the direction, averaged over 3x3 locations, [B, h, w].

    They are not averaged on coarse maps, where 3x3 locations are a large part of the map.
    """
    (x,) = maps
    values = (x.astype(jnp.float32) - foreground.mean) @ jnp.asarray(foreground.direction)
    if min(values.shape[1:]) < _COARSE:
        return values
    shape = values.shape if valid is None else (valid.shape[0], *values.shape[1:])
    weight = jnp.ones(shape) if valid is None else inside(valid, shape[1:]).astype(jnp.float32)
    sums, weights = (_means(each[..., None])[..., 0] for each in (values * weight, weight))
    return sums / jnp.maximum(weights, 1e-6)


def _means(x: jax.Array) -> jax.Array:
    """Means over 3x3 locations, with zeros beyond the map."""
    return nn.avg_pool(x, (3, 3), padding="SAME")


def _seen(part: Part) -> np.ndarray:
    """Locations of the only map that count, bool [B, h, w]."""
    (x,), valid = part
    return np.ones(x.shape[:3], bool) if valid is None else np.asarray(inside(valid, x.shape[1:3]))


def _border(seen: np.ndarray) -> np.ndarray:
    """Locations of [B, h, w] at the border of those that count."""
    return seen & ~np.array(
        [scipy.ndimage.binary_erosion(each, np.ones((3, 3))) for each in seen], bool
    )


def _otsu(values: np.ndarray) -> tuple[float, float]:
    """Otsu's threshold of values [N], and the share of their variance between its two sides."""
    counts, edges = np.histogram(values, _BINS)
    centres = (edges[:-1] + edges[1:]) / 2
    share = np.cumsum(counts) / counts.sum()
    total = np.cumsum(counts * centres) / counts.sum()
    spread = np.maximum(share * (1 - share), 1e-12)
    between = ((total[-1] * share - total) ** 2 / spread)[:-1]
    best, variance = int(between.argmax()), float(values.var(dtype=np.float64))
    return float(edges[best + 1]), cast(float, between[best]) / variance if variance else 0.0
