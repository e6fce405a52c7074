"""Maps, image scores and calibration leave out the pixels that do not count."""

import numpy as np
import pytest

from fastflow_jax.config import default, fill
from fastflow_jax.detectors.calibration import calibrate_on
from fastflow_jax.detectors.maps import top_mean, where_counted

RNG = np.random.default_rng(0)


def half(n=3, side=8):
    """Pixels that count: of the left half."""
    return np.arange(side)[None, None].repeat(n, 0).repeat(side, 1) < side // 2


def test_pixels_that_do_not_count_have_the_lowest_value_of_the_others():
    maps, valid = RNG.normal(size=(3, 8, 8)).astype(np.float32), half()
    found = np.asarray(where_counted(maps, valid))
    np.testing.assert_array_equal(found[valid], maps[valid])
    for own, of_map, counts in zip(found, maps, valid, strict=True):
        assert (own[~counts] == of_map[counts].min()).all()
    np.testing.assert_array_equal(where_counted(maps, None), maps)
    # Larger maps: pixels count at the same places.
    large = maps.repeat(2, 1).repeat(2, 2)
    np.testing.assert_array_equal(
        where_counted(large, valid)[:, :, 8:].min((1, 2)), found.min((1, 2))
    )


@pytest.mark.parametrize("part", [0.0, 0.25, 1.0])
def test_the_highest_part_is_of_the_pixels_that_count(part):
    maps, valid = RNG.normal(size=(3, 8, 8)).astype(np.float32), half()
    found = top_mean(where_counted(maps, valid), part, valid)
    n = max(1, round(part * 32))
    expected = [np.sort(m[v])[-n:].mean() for m, v in zip(maps, valid, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_maps_are_standardised_by_the_locations_that_count():
    c = default()
    c.detector = "knn"
    config = fill(c)
    maps, valid = RNG.normal(2, 3, (5, 8, 8)).astype(np.float32), half(5, 64)
    ones = np.ones(1, np.float32)
    counts = half(5)
    filled = np.where(counts, maps, maps.mean((1, 2), where=counts, keepdims=True))
    found = calibrate_on(config, (filled,), ones, valid)
    np.testing.assert_allclose(found.scale_mean, maps[counts].mean(), rtol=1e-5)
    np.testing.assert_allclose(found.scale_std, maps[counts].std(), rtol=1e-5)
