"""Nearest neighbours by Euclidean distance, in blocks of the bank to bound memory."""

import jax
import jax.numpy as jnp

_BLOCK = 4096  # rows of the bank at a time


def nearest(
    queries: jax.Array, bank: jax.Array, k: int, counts: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The k rows of the bank that are nearest to each query.

    They are found by |b|^2 - 2 ab in float32, which loses precision if vectors are far from the
    origin: centre them first. Their distances are then computed from the differences.

    Args:
      queries: [q, C].
      bank: [m, C].
      k: number of neighbours, up to m.
      counts: bool [m], False for rows to leave out; None to use all.

    Returns:
      Distances [q, k], approximately ascending, infinite if the bank has fewer than k rows to use;
      and indices int32 [q, k].
    """
    m = len(bank)
    size = min(_BLOCK, m)
    squares = jnp.sum(bank**2, axis=-1)
    if counts is not None:
        squares = jnp.where(counts, squares, jnp.inf)

    def body(best, start):
        # The last block overlaps the one before it; rows of the overlap are left out.
        start_inside = jnp.minimum(start, m - size)
        rows = jax.lax.dynamic_slice_in_dim(bank, start_inside, size)
        offset = jax.lax.dynamic_slice_in_dim(squares, start_inside, size)
        offset = jnp.where(start_inside + jnp.arange(size) < start, jnp.inf, offset)
        found, index = _smallest(offset - 2 * _product(queries, rows.T), min(k, size))
        values = jnp.concatenate([best[0], found], axis=1)
        indices = jnp.concatenate([best[1], start_inside + index], axis=1)
        found, index = _smallest(values, k)
        return (found, jnp.take_along_axis(indices, index, axis=1)), None

    none = jnp.full((len(queries), k), jnp.inf), jnp.zeros((len(queries), k), jnp.int32)
    (found, index), _ = jax.lax.scan(body, none, jnp.arange(0, m, size))
    exact = jnp.linalg.norm(queries[:, None] - bank[index], axis=-1)
    return jnp.where(jnp.isinf(found), jnp.inf, exact), index


def nearest_squared_distances(vectors: jax.Array, bank: jax.Array) -> jax.Array:
    """Squared distances of vectors [B, h, w, C] to the nearest row of a bank [M, C], [B, h, w].

    Computed as |a|^2 - 2 ab + |b|^2, which is accurate for vectors around the origin such as
    latents, and several times faster than `nearest`, which also returns the index.
    """
    bank = jnp.asarray(bank, jnp.float32)
    squares = jnp.sum(bank**2, axis=-1)

    def of_image(rows):  # one at a time: the distances of all images would need much memory
        return jnp.min(squares - 2 * _product(rows, bank.T), axis=-1)

    found = jax.lax.map(of_image, vectors.reshape(len(vectors), -1, vectors.shape[-1]))
    return jnp.maximum(found.reshape(vectors.shape[:-1]) + jnp.sum(vectors**2, axis=-1), 0.0)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")


def _smallest(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k smallest values of each row, and their indices."""
    if k == 1:  # on a CPU a sort takes many times as long, and argmin three times
        least, n = values.min(-1, keepdims=True), values.shape[-1]
        first = jnp.where(values == least, jnp.arange(n), n - 1)
        return least, first.min(-1, keepdims=True)
    found, index = jax.lax.top_k(-values, k)
    return -found, index
