"""Nearest neighbours against float64."""

import jax
import numpy as np
import pytest

from fastflow_jax.detectors.nearest import nearest

RNG = np.random.default_rng(0)


def all_distances(a, b):
    return np.linalg.norm(a[:, None].astype(np.float64) - b, axis=-1)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("m", [3, 97, 9001])
def test_neighbours_equal_those_in_float64(k, m):
    bank = RNG.normal(size=(m, 20)).astype(np.float32)
    queries = np.concatenate([RNG.normal(size=(30, 20)), bank[:3] + 1e-4]).astype(np.float32)
    distances, index = jax.jit(nearest, static_argnums=2)(queries, bank, k)
    expected = all_distances(queries, bank)
    order = np.argsort(expected, axis=1)[:, :k]
    np.testing.assert_allclose(distances, np.take_along_axis(expected, order, 1), rtol=1e-5)
    np.testing.assert_array_equal(index, order)


def test_invalid_rows_are_not_found():
    bank = RNG.normal(size=(50, 6)).astype(np.float32)
    counts = np.arange(50) % 2 == 0
    distances, index = nearest(bank, bank, 2, counts)
    np.testing.assert_allclose(
        distances, np.sort(all_distances(bank, bank[counts]), axis=1)[:, :2], rtol=1e-5, atol=1e-5
    )
    assert np.all(np.asarray(index) % 2 == 0)
    alone, _ = nearest(bank, bank, 2, np.arange(50) == 4)
    assert np.all(np.isfinite(alone[:, 0]))
    assert np.all(np.isinf(alone[:, 1]))
