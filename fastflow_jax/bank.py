"""A base distribution that normal images have a say in: banks of their latents.

A flow is trained to bring normal features to one Gaussian, and does not quite: the latents of
normal images keep to some places and leave others empty, in which a defect may lie. So a location
is also judged under mixtures of Gaussians of unit width about latents of training images, of which
the nearest decides: |z - z'|^2 / 2 in the place of |z|^2 / 2. That the base of a trained flow be
estimated anew is the idea of Kim et al., AltUB (arXiv 2210.14913), who fit one Gaussian.

One bank holds latents as they are; in another both they and what is compared with them are means
over 3x3 neighbours, as a defect moves neighbours alike and chance does not.
"""

import collections
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fastflow_jax.features import Features, TrainingFeatures, inside

VIEWS = ("place", "mean")


def views(z: jax.Array, seen: jax.Array | None = None) -> dict[str, jax.Array]:
    """Latents as they are and as means over 3x3 neighbours, each a tensor of the shape of `z`.

    Args:
      z: [B, h, w, C].
      seen: bool [B, h, w]; what is not seen, and what lies outside of the map, does not count.
    """
    weight = (jnp.ones(z.shape[:3]) if seen is None else seen.astype(z.dtype))[..., None]
    total, weights = (
        jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
        for x in (z * weight, weight)
    )
    return dict(zip(VIEWS, (z, total / jnp.maximum(weights, 1.0)), strict=True))


def draw(
    latents: Callable[[Features, np.ndarray | None], dict[str, np.ndarray]],
    features: TrainingFeatures,
    size: int,
    batch_size: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Banks of latents at random locations of the training images, each float16 [M, C].

    Args:
      latents: (features, valid) of up to `batch_size` images -> what to draw from, [B, h, w, C]; a
        bank from each, under its name.
      features: of the training images.
      size: of a bank. It has as many locations of each image, of as many images as it takes; so M
        is up to one for each image more, and less where there are fewer locations.
      batch_size: images whose latents are computed at a time.
      seed: of the choice.
    """
    rng = np.random.default_rng(seed)
    images = min(size, features.n)
    chosen = np.zeros(features.n, bool)
    chosen[rng.choice(features.n, images, replace=False)] = True
    each = -(-size // images)
    banks, first = collections.defaultdict(list), 0
    for maps, valid in features.in_batches(batch_size):
        take = np.flatnonzero(chosen[first : first + len(maps[0])])
        first += len(maps[0])
        if not len(take):
            continue
        valid = None if valid is None else valid[take]
        for name, z in latents(tuple(m[take] for m in maps), valid).items():
            banks[name].append(_draw(rng, z, valid, each))
    return {name: np.concatenate(rows).astype(np.float16) for name, rows in banks.items()}


def _draw(
    rng: np.random.Generator, z: np.ndarray, valid: np.ndarray | None, each: int
) -> np.ndarray:
    """`each` random rows of every image, [B, h, w, C] -> [M, C]; fewer where it has not so many."""
    order = rng.random(z.shape[:3], np.float32)
    if valid is not None:
        order[~np.asarray(inside(valid, z.shape[1:3]))] = np.inf  # padding comes last
    order = order.reshape(len(z), -1)
    places = np.argsort(order, axis=1)[:, :each]
    rows = np.take_along_axis(z.reshape(*order.shape, -1), places[..., None], axis=1)
    return rows[np.isfinite(np.take_along_axis(order, places, axis=1))]


def squared_distances(view: jax.Array, bank: jax.Array) -> jax.Array:
    """Of each of the latents to its nearest in the bank, [B, h, w].

    As |v|^2 - 2 vb + |b|^2, which is exact enough where values lie about the origin as latents do,
    and several times as fast as to look up which one it is.

    Args:
      view: one of `views`, [B, h, w, C].
      bank: that was drawn from the same view of training images, [M, C].
    """
    bank = jnp.asarray(bank, jnp.float32)
    squares = jnp.sum(bank**2, axis=-1)

    def of_image(rows):  # one at a time: the distances of all would take much memory
        return jnp.min(squares - 2 * jnp.matmul(rows, bank.T, precision="highest"), axis=-1)

    found = jax.lax.map(of_image, view.reshape(len(view), -1, view.shape[-1]))
    return jnp.maximum(found.reshape(view.shape[:-1]) + jnp.sum(view**2, axis=-1), 0.0)
