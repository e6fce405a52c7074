"""Tiles cover an image, and their maps are blended without seams."""

import tracemalloc

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from fastflow_jax.data import tiling


def blend(maps, where, size):
    blender = tiling.Blender(size, where)
    for tile_map, place in zip(maps, where, strict=True):
        blender.add(np.float32(tile_map), place)
    return blender.result()


sides = st.tuples(st.integers(1, 90), st.integers(1, 90))


@settings(deadline=None)
@given(sides, st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_a_linear_map_has_no_seams(size, tile):
    where = tiling.places(size, tile)
    y, x = np.mgrid[: size[0], : size[1]]
    whole = 0.5 * y - 0.25 * x + 3
    blended = blend([whole[place] for place in where], where, size)
    np.testing.assert_allclose(blended, whole, rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(sides, st.tuples(st.integers(4, 40), st.integers(4, 40)))
def test_tiles_have_one_size_overlap_and_cover_the_image(size, tile):
    count = np.zeros(size, int)
    where = tiling.places(size, tile)
    for place in where:
        assert count[place].shape == tuple(np.minimum(size, tile))
        count[place] += 1
    assert count.min() >= 1
    if len(where) > 1:
        assert (count > 1).mean() > 0.1


def test_different_maps_are_blended_gradually():
    where = tiling.places((10, 70), (10, 40))
    assert len(where) == 2
    blended = blend([np.zeros((10, 40)), np.ones((10, 40))], where, (10, 70))
    steps = np.diff(blended, axis=1)
    assert (steps >= 0).all()
    assert steps.max() < 0.15
    assert blended[0, 0] == 0
    assert blended[0, -1] == pytest.approx(1)


@settings(deadline=None)
@given(sides, st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(0, 99))
def test_blending_equals_its_definition_in_float64(size, tile, seed):
    where = tiling.places(size, tile)
    rng = np.random.default_rng(seed)
    maps = [rng.uniform(1, 100, np.minimum(size, tile)).astype(np.float32) for _ in where]
    total, weights = np.zeros(size), np.zeros(size)
    for tile_map, place in zip(maps, where, strict=True):
        ramps = [np.minimum(np.arange(n) + 1, n - np.arange(n)) for n in tile_map.shape]
        total[place] += np.outer(*ramps) * tile_map
        weights[place] += np.outer(*ramps)
    order = rng.permutation(len(where))
    blended = blend([maps[i] for i in order], [where[i] for i in order], size)
    assert blended.dtype == np.float32
    np.testing.assert_allclose(blended, total / weights, rtol=1e-6)


def test_memory_does_not_depend_on_the_number_of_tiles():
    size = (4000, 500)
    where = tiling.places(size, (250, 250))
    tile_map = np.ones((250, 250), np.float32)
    tracemalloc.start()
    blender = tiling.Blender(size, where)
    for place in where:
        blender.add(tile_map, place)
    result = blender.result()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_allclose(result, 1, rtol=1e-6)
    assert peak < result.nbytes + 4 * tile_map.nbytes
