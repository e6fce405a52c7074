"""Memory bank of latents of normal images, for nearest-neighbour scoring.

A flow is trained to map normal features to one Gaussian, and does so only approximately: latents of
normal images leave some regions empty, in which a defect may be. So a location is also scored under
a mixture of Gaussians of unit width around latents of training images, of which the nearest
decides: its energy is |m - b|^2 / 2 instead of |z|^2 / 2. Estimating the base distribution of a
trained flow again is the idea of Kim et al., AltUB (arXiv 2210.14913), who fit one Gaussian.

Both sides of the distance are means over 3x3 locations, because a defect changes neighbours alike
and chance does not. Maps that are coarse, so that 3x3 locations are a large part, are not averaged.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fastflow_jax.features.extract import Features, TrainingFeatures, inside

_COARSE = 12  # locations on the shorter side of a map, below which it is not averaged


def entries(z: jax.Array, seen: jax.Array | None = None) -> jax.Array:
    """Entries and queries of a bank: means of latents over 3x3 locations.

    The weights are 1, 2, 1 in both directions. Latents of a coarse map are returned as they are.

    Args:
      z: latents [B, h, w, C].
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
    latents: Callable[[Features, np.ndarray | None], tuple[np.ndarray, ...]],
    features: TrainingFeatures,
    size: int,
    batch_size: int,
    seed: int,
) -> tuple[np.ndarray, ...]:
    """Draws a bank for each scale from random locations of the training images, float16 [M, C].

    Args:
      latents: (features, valid) of up to `batch_size` images -> `entries`, [B, h, w, C] per scale.
      features: of the training images.
      size: approximate size of a bank. The same number of locations is drawn from each image, so
        that M exceeds the size by at most one location per image, and is lower if there are not
        enough locations.
      batch_size: images whose latents are computed at a time.
      seed: of the draw.
    """
    images = min(size, features.n)
    chosen = np.zeros(features.n, bool)
    chosen[np.random.default_rng(seed).choice(features.n, images, replace=False)] = True
    rngs = [np.random.default_rng((seed, scale)) for scale in range(len(features.shapes))]
    each = -(-size // images)
    parts = []
    for maps, valid in features.in_batches(batch_size, chosen):
        found = latents(maps, valid)
        parts.append([_draw(rng, m, valid, each) for rng, m in zip(rngs, found, strict=True)])
    return tuple(np.concatenate(rows).astype(np.float16) for rows in zip(*parts, strict=True))


def _draw(
    rng: np.random.Generator, latents: np.ndarray, valid: np.ndarray | None, each: int
) -> np.ndarray:
    """Draws `each` locations of every image, or all if it has fewer: [B, h, w, C] -> [M, C]."""
    order = rng.random(latents.shape[:3], np.float32)
    if valid is not None:
        order[~np.asarray(inside(valid, order.shape[1:]))] = np.inf  # padding is sorted to the end
    order = order.reshape(len(latents), -1)
    chosen = np.argsort(order, axis=1)[:, :each]
    rows = latents.reshape(*order.shape, -1)
    rows = np.take_along_axis(rows, chosen[..., None], axis=1)
    return rows[np.isfinite(np.take_along_axis(order, chosen, axis=1))]
