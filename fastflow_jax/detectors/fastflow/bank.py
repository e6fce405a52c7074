"""Memory banks of vectors at locations of normal images, for nearest-neighbour scoring.

A flow is trained to map normal features to one Gaussian, and does so only approximately: latents of
normal images leave some regions empty, in which a defect may be. It also maps small defects to
probable latents. So FastFlow compares two vectors of each location with those of training images,
its whitened features and its latents. The energy is |v - b|^2 / 2, with b the nearest row of the
bank, in place of |z|^2 / 2: that of a mixture of Gaussians of unit width, of which the nearest
decides. Estimating the base distribution of a trained flow again is the idea of Kim et al., AltUB
(arXiv 2210.14913), who fit one Gaussian; comparing features with a coreset is that of PatchCore
(arXiv 2106.08265).

A coreset has rows from every region that normal images occupy. Random rows miss rare normal
regions, whose images then look anomalous.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fastflow_jax.detectors.nearest import k_center
from fastflow_jax.features.extract import Features, TrainingFeatures, inside

_COARSE = 12  # locations on the shorter side of a map, below which it is not averaged
_CANDIDATES = 50_000  # random rows that a coreset is chosen from
_PROJECTION = 128  # dimensions in which it is chosen, as in PatchCore


def averaged(z: jax.Array, seen: jax.Array | None = None) -> jax.Array:
    """Means of vectors over 3x3 locations: a defect changes neighbours alike, chance does not.

    The weights are 1, 2, 1 in both directions. A coarse map, of which 3x3 locations are a large
    part, is returned as it is.

    Args:
      z: vectors [B, h, w, C].
      seen: bool [B, h, w], False in padding; None without padding. Padding and the outside of the
        map have no weight.

    Returns:
      [B, h, w, C].
    """
    if min(z.shape[1:3]) < _COARSE:
        return z
    if seen is None:
        seen = jnp.ones((1, *z.shape[1:3]), bool)
    weight = seen[..., None].astype(z.dtype)
    return _sums(z * weight) / jnp.maximum(_sums(weight), 1.0)


def _sums(x):
    """Sums over 3x3 locations of [B, h, w, C] with weights 1, 2, 1 in both directions."""
    for axis in (1, 2):
        n = x.shape[axis]
        beyond = [(0, 0)] * 4
        beyond[axis] = (1, 1)
        padded = jnp.pad(x, beyond)
        before, after = (jax.lax.slice_in_dim(padded, i, i + n, axis=axis) for i in (0, 2))
        x = before + 2 * x + after
    return x


def draw(
    vectors: Callable[[Features, np.ndarray | None], tuple[np.ndarray, ...]],
    features: TrainingFeatures,
    size: int,
    batch_size: int,
    seed: int,
) -> tuple[np.ndarray, ...]:
    """Draws banks from random locations of the training images, float16 [M, C] each.

    Args:
      vectors: (features, valid) of up to `batch_size` images -> vectors [B, h, w, C] of each bank.
      features: of the training images.
      size: approximate size of a bank. The same number of locations is drawn from each image, so
        that M exceeds the size by at most one location per image, and is lower if there are not
        enough locations.
      batch_size: images whose vectors are computed at a time.
      seed: of the draw.
    """
    images = min(size, features.n)
    chosen = np.zeros(features.n, bool)
    chosen[np.random.default_rng(seed).choice(features.n, images, replace=False)] = True
    each = -(-size // images)
    parts, rngs = [], []  # rows are many, so they are rounded at once
    for maps, valid in features.in_batches(batch_size, chosen):
        found = vectors(maps, valid)
        rngs = rngs or [np.random.default_rng((seed, i)) for i in range(len(found))]
        drawn = (_draw(rng, m, valid, each) for rng, m in zip(rngs, found, strict=True))
        parts.append([rows.astype(np.float16) for rows in drawn])
    return tuple(np.concatenate(rows) for rows in zip(*parts, strict=True))


def draw_coresets(
    vectors: Callable[[Features, np.ndarray | None], tuple[np.ndarray, ...]],
    features: TrainingFeatures,
    size: int,
    batch_size: int,
    seed: int,
    *,
    label: str,
) -> tuple[np.ndarray, ...]:
    """Draws banks of `size` rows, which are a greedy k-center coreset of more rows of `draw`.

    For the other arguments see `draw`; `label` is that of the progress bar.
    """
    drawn = draw(vectors, features, max(size, _CANDIDATES), batch_size, seed)
    with tqdm(
        total=size * len(drawn), desc=label, unit="pt", leave=False, dynamic_ncols=True
    ) as bar:
        return tuple(rows[_coreset(rows, size, seed, bar)] for rows in drawn)


def _coreset(rows: np.ndarray, size: int, seed: int, bar: tqdm) -> np.ndarray:
    """Indices of the coreset; all if there are not more rows than `size`."""
    if len(rows) <= size:
        bar.update(size)
        return np.arange(len(rows))
    rng, points = np.random.default_rng(seed), rows.astype(np.float32)
    if (channels := points.shape[1]) > _PROJECTION:
        scale = _PROJECTION**-0.5
        points = points @ np.float32(rng.normal(scale=scale, size=(channels, _PROJECTION)))
    chosen = []
    for picked in k_center(points, size, int(rng.integers(len(points)))):
        chosen.append(picked)
        bar.update(len(picked))
    return np.concatenate(chosen)


def _draw(
    rng: np.random.Generator, vectors: np.ndarray, valid: np.ndarray | None, each: int
) -> np.ndarray:
    """Draws `each` locations of every image, or all if it has fewer: [B, h, w, C] -> [M, C]."""
    order = rng.random(vectors.shape[:3], np.float32)
    if valid is not None:
        order[~np.asarray(inside(valid, order.shape[1:]))] = np.inf  # padding is sorted to the end
    order = order.reshape(len(vectors), -1)
    chosen = np.argsort(order, axis=1)[:, :each]
    rows = vectors.reshape(*order.shape, -1)
    rows = np.take_along_axis(rows, chosen[..., None], axis=1)
    return rows[np.isfinite(np.take_along_axis(order, chosen, axis=1))]
