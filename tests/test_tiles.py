"""Tiles cover an image, and their maps come together without seams."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from fastflow_jax import tiles

sides = st.tuples(st.integers(1, 90), st.integers(1, 90))


@settings(deadline=None)
@given(sides, st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_a_linear_map_has_no_seams(size, tile):
    where = tiles.places(size, tile)
    y, x = np.mgrid[: size[0], : size[1]]
    whole = 0.5 * y - 0.25 * x + 3
    blended = tiles.blend([whole[place] for place in where], where, size)
    np.testing.assert_allclose(blended, whole, rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(sides, st.tuples(st.integers(4, 40), st.integers(4, 40)))
def test_tiles_have_one_size_overlap_and_cover_the_image(size, tile):
    count = np.zeros(size, int)
    where = tiles.places(size, tile)
    for place in where:
        assert count[place].shape == tuple(np.minimum(size, tile))
        count[place] += 1
    assert count.min() >= 1
    if len(where) > 1:
        assert (count > 1).mean() > 0.1


def test_maps_that_differ_fade_into_each_other():
    where = tiles.places((10, 70), (10, 40))
    assert len(where) == 2
    blended = tiles.blend([np.zeros((10, 40)), np.ones((10, 40))], where, (10, 70))
    steps = np.diff(blended, axis=1)
    assert (steps >= 0).all()
    assert steps.max() < 0.15
    assert blended[0, 0] == 0
    assert blended[0, -1] == pytest.approx(1)
