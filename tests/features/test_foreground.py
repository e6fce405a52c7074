"""The foreground of images, found by the principal component of features."""

import numpy as np
import pytest

from fastflow_jax.errors import InputError
from fastflow_jax.features.extract import cached_features
from fastflow_jax.features.foreground import Foreground, regions

SIZE = (256, 256)


def discs(n, seed=0, noise=0.3, radius=5.5, channels=6):
    """Features [n, 16, 16, channels] of a disc at random places, and the disc, bool."""
    rng = np.random.default_rng(seed)
    centre = rng.uniform(6, 9, (n, 2, 1, 1))
    rows, columns = np.mgrid[:16, :16]
    inside = np.hypot(rows - centre[:, 0], columns - centre[:, 1]) < radius
    change = np.random.default_rng(99).normal(size=channels)
    return inside[..., None] * change + noise * rng.normal(size=(n, 16, 16, channels)), inside


def shares(found):
    """Share of the pixels of each location that count, [n, 16, 16]."""
    return found.reshape(len(found), 16, 16, 16, 16).mean((2, 4))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_of_new_images_is_found_whatever_its_sign(sign):
    train, _ = discs(40)
    foreground = Foreground.fit(cached_features((np.float16(sign * train),)), SIZE)
    assert foreground is not None
    features, inside = discs(10, seed=1)
    found = shares(regions(foreground, (np.float16(sign * features),), None, SIZE))
    assert found[inside].mean() > 0.9
    corners = found[:, [0, 0, 15, 15], [0, 15, 0, 15]]
    assert corners.max() == 0


def test_the_map_of_stride_16_is_used():
    train, _ = discs(40)
    others = np.random.default_rng(2).normal(size=(40, 32, 32, 6)), np.zeros((40, 8, 8, 6))
    maps = others[0], train, others[1]
    foreground = Foreground.fit(cached_features(tuple(map(np.float16, maps))), SIZE)
    assert foreground is not None
    alone = Foreground.fit(cached_features((np.float16(train),)), SIZE)
    assert alone is not None
    np.testing.assert_array_equal(foreground.direction, alone.direction)


def test_a_missing_part_of_aligned_parts_is_in_the_foreground():
    rows, columns = np.mgrid[:16, :16]
    inside = np.hypot(rows - 7.5, columns - 7.5) < 5.5
    rng, change = np.random.default_rng(0), np.random.default_rng(99).normal(size=6)
    train = inside[None, ..., None] * change + 0.3 * rng.normal(size=(40, 16, 16, 6))
    foreground = Foreground.fit(cached_features((np.float16(train),)), SIZE)
    assert foreground is not None
    broken = train[:1].copy()
    broken[:, :, 8:] -= inside[None, :, 8:, None] * change
    found = shares(regions(foreground, (np.float16(broken),), None, SIZE))[0]
    assert found[6:9, 10].min() > 0.9  # where most training images have foreground


def test_textures_have_no_foreground():
    rng = np.random.default_rng(0)
    for features in (rng.normal(size=(40, 16, 16, 6)), rng.uniform(size=(40, 16, 16, 6))):
        assert Foreground.fit(cached_features((np.float16(features),)), SIZE) is None
    assert Foreground.fit(cached_features((np.zeros((4, 16, 16, 6), np.float16),)), SIZE) is None


def test_an_image_without_foreground_counts_as_a_whole():
    train, _ = discs(40, radius=4)
    foreground = Foreground.fit(cached_features((np.float16(train),)), SIZE)
    assert foreground is not None
    foreground = foreground.replace(usual=np.zeros((16, 16), np.float32))
    empty = np.zeros((1, 16, 16, 6), np.float16)
    assert regions(foreground, (empty,), None, SIZE).all()
    valid = np.zeros((1, *SIZE), bool)
    valid[:, :40] = True
    np.testing.assert_array_equal(regions(foreground, (empty,), valid, SIZE), valid)


def test_padding_is_never_foreground():
    train, _ = discs(40)
    valid = np.ones((40, *SIZE), bool)
    valid[:, :16] = False
    train[:, 0] = 1e3  # of no consequence
    foreground = Foreground.fit(cached_features((np.float16(train),), valid), SIZE)
    assert foreground is not None
    found = regions(foreground, (np.float16(train),), valid, SIZE)
    assert not found[:, :16].any()
    assert 0.2 < found.mean() < 0.8


def test_a_saved_foreground_is_the_same_and_a_damaged_one_is_refused():
    train, _ = discs(40)
    foreground = Foreground.fit(cached_features((np.float16(train),)), SIZE)
    assert foreground is not None
    state = foreground.state_dict()
    again = Foreground.from_state(state)
    assert all(np.array_equal(getattr(again, name), array) for name, array in state.items())
    with pytest.raises(InputError, match="direction is missing"):
        Foreground.from_state({k: v for k, v in state.items() if k != "direction"})
