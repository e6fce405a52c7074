"""What the flow made of normal images: a bank of their latents, that new ones are compared with.

A flow is trained to bring normal features to one Gaussian, and does not quite: the latents of
normal images keep to some places and leave others empty, in which a defect may lie. So a location
is also judged under a mixture of Gaussians of unit width about latents of training images, of which
the nearest decides: |m - b|^2 / 2 beside |z|^2 / 2. That the base of a trained flow be estimated
anew is the idea of Kim et al., AltUB (arXiv 2210.14913), who fit one Gaussian.

Both sides of that distance are means over 3x3 places, as a defect moves neighbours alike and chance
does not. On coarse maps, of which 3x3 places are a large part, they are latents as they are.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fastflow_jax.features.extract import Features, TrainingFeatures, inside

_COARSE = 12  # places on a map's shorter side, below which it has no means


def entries(z: jax.Array, seen: jax.Array | None = None) -> jax.Array:
    """What a bank holds of latents, and is asked about: their means over 3x3 places, or themselves.

    Means are weighted 1, 2, 1 both ways; latents of a coarse map stay as they are.

    Args:
      z: [B, h, w, C].
      seen: bool [B, h, w]; what is not seen, and what lies outside of the map, does not count.

    Returns:
      A tensor of the shape of `z`.
    """
    if min(z.shape[1:3]) < _COARSE:
        return z
    if seen is None:
        seen = np.ones((1, *z.shape[1:3]), bool)
    weight = seen[..., None].astype(z.dtype)
    return _sums(z * weight) / jnp.maximum(_sums(weight), 1.0)


def _sums(x):
    """Over 3x3 places of [B, h, w, C], weighted 1, 2, 1 both ways, zeros outside."""
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
    """A bank for each scale, from random locations of the training images, float16 [M, C].

    Args:
      latents: (features, valid) of up to `batch_size` images -> `entries`, [B, h, w, C] a scale.
      features: of the training images.
      size: of a bank, about: it has as many locations of each image, of as many images as it
        takes, so that M is up to one for each image more (nearly twice the size at the worst), and
        less where there are fewer locations.
      batch_size: images whose latents are computed at a time.
      seed: of the choice.
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
    """`each` random rows of every image, [B, h, w, C] -> [M, C]; fewer where it has not so many."""
    order = rng.random(latents.shape[:3], np.float32)
    if valid is not None:
        order[~np.asarray(inside(valid, order.shape[1:]))] = np.inf  # padding comes last
    order = order.reshape(len(latents), -1)
    places = np.argsort(order, axis=1)[:, :each]
    rows = latents.reshape(*order.shape, -1)
    rows = np.take_along_axis(rows, places[..., None], axis=1)
    return rows[np.isfinite(np.take_along_axis(order, places, axis=1))]


def squared_distances(latents: jax.Array, bank: jax.Array) -> jax.Array:
    """Of each of the latents [B, h, w, C] to its nearest in the bank [M, C], [B, h, w].

    As |m|^2 - 2 mb + |b|^2, which is exact enough where values lie about the origin as latents do,
    and several times as fast as to look up which one it is.
    """
    bank = jnp.asarray(bank, jnp.float32)
    squares = jnp.sum(bank**2, axis=-1)

    def of_image(rows):  # one at a time: the distances of all would take much memory
        return jnp.min(squares - 2 * jnp.matmul(rows, bank.T, precision="highest"), axis=-1)

    found = jax.lax.map(of_image, latents.reshape(len(latents), -1, latents.shape[-1]))
    return jnp.maximum(found.reshape(latents.shape[:-1]) + jnp.sum(latents**2, axis=-1), 0.0)
