"""Nearest neighbours by Euclidean distance, and the choice of rows that represent many."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from fastflow_jax import parallel

_BLOCK = 4096  # rows of the bank at a time, to bound memory
_QUERIES = 1024  # rows that are compared with a bank at a time, likewise
_PICKS = 64  # points of a coreset that are chosen between two passes over all rows
_CANDIDATES = 4096  # rows that they are chosen from


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
    m = bank.shape[0]
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
        chosen = jnp.take_along_axis(indices, index, axis=1, mode="promise_in_bounds")
        return (found, chosen), None

    none = (
        jnp.full((queries.shape[0], k), jnp.inf),
        jnp.zeros((queries.shape[0], k), jnp.int32),
    )
    (found, index), _ = jax.lax.scan(body, none, jnp.arange(0, m, size))
    exact = jnp.linalg.norm(queries[:, None] - bank[index], axis=-1)
    return jnp.where(jnp.isinf(found), jnp.inf, exact), index


def k_center(
    rows: np.ndarray, n: int, start: int | None = None, distances: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Greedy k-center: repeatedly chooses the row farthest from the chosen rows.

    Exact (up to ties), and faster than a pass over all rows for each point: distances to the chosen
    rows only decrease. While the farthest of some candidates, whose distances are up to date, is
    farther than every other row was at the last pass, it is the farthest row. Algorithm 1 of
    PatchCore (arXiv 2106.08265), after Sener and Savarese (arXiv 1708.00489).

    Args:
      rows: [N, C], float32; they are spread over the devices.
      n: number of rows to choose, up to N.
      start: index of the first row; None to start with `distances`.
      distances: float32 [N], squared distances to rows that were chosen before; None without any.

    Yields:
      Indices of the next rows, the start first.
    """
    missing = -len(rows) % parallel.n_own_devices()
    padded = np.pad(rows - rows.mean(0), ((0, missing), (0, 0)))
    squares = parallel.split(np.sum(padded**2, axis=1))
    # Padding and chosen rows have the distance -1, so that they are never the farthest.
    known = np.full(len(rows), np.inf, "f") if distances is None else distances
    far = parallel.split(np.pad(known, (0, missing), constant_values=-1))
    rows, left = parallel.split(padded), n
    if start is not None:
        far = _update(rows, squares, far, jnp.full(1, start))
        yield np.array([start])
        left -= 1
    while left:
        far, picked, count = _pick(rows, squares, far, min(left, _PICKS))
        yield np.asarray(picked)[: int(count)]
        left -= int(count)


def lacking(rows: np.ndarray, bank: np.ndarray, n: int) -> np.ndarray:
    """Chooses rows that a bank lacks most: greedy k-center that starts from the bank.

    Args:
      rows: [N, C], float32.
      bank: [M, C].
      n: largest number of rows.

    Returns:
      Indices of the rows.
    """
    if len(rows) <= n:
        return np.arange(len(rows))
    bank = bank.astype(np.float32)
    centre = bank.mean(0)
    blocks = np.pad(rows - centre, ((0, -len(rows) % _QUERIES), (0, 0)))
    blocks = blocks.reshape(-1, _QUERIES, 1, rows.shape[1])
    found = np.asarray(_squared_distances(blocks, bank - centre)).ravel()[: len(rows)]
    return np.concatenate(list(k_center(rows, n, distances=found)))


@jax.jit
def _pick(rows, squares, far, most):
    """Chooses 1 to `most` points; returns the updated `far`, the points [_PICKS], their count."""
    bounds, index = jax.lax.top_k(far, min(_CANDIDATES, len(far)))
    candidates = rows[index]
    others = bounds[-1] if len(index) < len(far) else -jnp.inf

    def goes_on(state):
        count, far, _ = state
        return (count < most) & ((count == 0) | (far.max() > others))

    def body(state):
        count, far, picked = state
        i = far.argmax()
        far = jnp.minimum(far, jnp.sum((candidates - candidates[i]) ** 2, axis=1)).at[i].set(-1)
        return count + 1, far, picked.at[count].set(index[i])

    picked = jnp.full(_PICKS, index[0])
    count, _, picked = jax.lax.while_loop(goes_on, body, (0, bounds, picked))
    return _update(rows, squares, far, picked), picked, count


@jax.jit
def _update(rows, squares, far, picked):
    """Squared distances [N] to the chosen rows, including those at `picked`."""
    points = rows[picked]
    products = jnp.matmul(rows, points.T, precision="highest")
    distances = squares[:, None] - 2 * products + squares[picked]
    return jnp.minimum(far, distances.min(1).clip(0)).at[picked].set(-1)


def nearest_squared_distances(vectors: jax.Array, bank: jax.Array) -> jax.Array:
    """Squared distances of vectors [B, h, w, C] to the nearest row of a bank [M, C], [B, h, w].

    Computed as |a|^2 - 2 ab + |b|^2, which is accurate for vectors around the origin such as
    latents, and several times faster than `nearest`, which also returns the index. The last two
    terms are one product, (a, 1) times (-2b, |b|^2).
    """
    bank = jnp.asarray(bank, jnp.float32)
    matrix = jnp.concatenate([-2 * bank, jnp.sum(bank**2, axis=-1, keepdims=True)], axis=1).T
    rows = vectors.reshape(vectors.shape[0], -1, vectors.shape[-1])
    rows = jnp.pad(rows, [(0, 0), (0, 0), (0, 1)], constant_values=1)
    # One image at a time, because the distances of all need much memory.
    found = jax.lax.map(lambda image: jnp.min(_product(image, matrix), axis=-1), rows)
    return jnp.maximum(found.reshape(vectors.shape[:-1]) + jnp.sum(vectors**2, axis=-1), 0.0)


_squared_distances = jax.jit(nearest_squared_distances)


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
