"""Memory banks against scipy and float64."""

import jax
import numpy as np
import pytest
from scipy.ndimage import convolve

from fastflow_jax.detectors.fastflow.bank import averaged, draw, draw_coresets
from fastflow_jax.detectors.nearest import nearest_squared_distances
from fastflow_jax.features.extract import cached_features

RNG = np.random.default_rng(0)


def expected_means(z, seen):
    """By scipy, zeros outside."""
    kernel, found = np.outer([1, 2, 1], [1, 2, 1]), np.empty(z.shape)
    for i, (image, counts) in enumerate(zip(z, seen.astype(float), strict=True)):
        n = convolve(counts, kernel, mode="constant")
        for c in range(z.shape[-1]):
            total = convolve(image[..., c] * counts, kernel, mode="constant")
            found[i, ..., c] = total / np.maximum(n, 1)
    return found


@pytest.mark.parametrize("padded", [False, True])
def test_means_exclude_padding(padded):
    z = RNG.normal(size=(2, 13, 12, 3))
    seen = np.ones((2, 13, 12), bool)
    if padded:
        seen[0, :2] = seen[1, :, 11] = False
    found = averaged(z.astype(np.float32), seen if padded else None)
    np.testing.assert_allclose(found, expected_means(z, seen), atol=1e-6)


def test_values_in_padding_do_not_affect_means():
    z = RNG.normal(size=(1, 12, 12, 2)).astype(np.float32)
    seen = np.ones((1, 12, 12), bool)
    seen[:, :2] = False
    spoilt = z.copy()
    spoilt[:, :2] = 1e6
    one, other = (averaged(each, seen) for each in (z, spoilt))
    np.testing.assert_array_equal(one[:, 2:], other[:, 2:])


def test_a_coarse_map_is_not_averaged():
    z = RNG.normal(size=(2, 11, 20, 3)).astype(np.float32)
    np.testing.assert_array_equal(averaged(z), z)


@pytest.mark.parametrize("size", [1, 40, 5000])
def test_distances_equal_those_to_the_nearest_entry(size):
    latents = RNG.normal(size=(3, 4, 5, 6)).astype(np.float32)
    bank = (0.3 * RNG.normal(size=(size, 6))).astype(np.float16)
    latents[0, 0, 0] = bank[0]  # one that is in it
    offsets = latents[..., None, :].astype(float) - bank.astype(float)
    expected = (offsets**2).sum(-1).min(-1)
    np.testing.assert_allclose(
        jax.jit(nearest_squared_distances)(latents, bank), expected, atol=1e-5
    )


def numbered(n, shapes):
    """Features that say which image and place they are of."""
    maps = []
    for h, w in shapes:
        places = np.arange(h * w).reshape(1, h, w, 1)
        image = np.arange(n).reshape(n, 1, 1, 1)
        maps.append(np.concatenate(np.broadcast_arrays(image, places), -1).astype(np.float32))
    return tuple(maps)


def drawn(training, size, seed=0, batch_size=4):
    """Banks of the features themselves."""
    return draw(lambda maps, valid: maps, training, size, batch_size, seed)


def test_a_bank_has_equally_many_locations_of_each_image():
    training = cached_features(numbered(10, [(4, 4), (2, 3)]))
    for bank, places in zip(drawn(training, 40), (16, 6), strict=True):
        assert bank.shape == (40, 2)
        assert len(np.unique(bank, axis=0)) == 40  # none twice
        np.testing.assert_array_equal(np.bincount(bank[:, 0].astype(int)), 4)
        assert set(bank[:, 1]) <= set(range(places))


def test_a_bank_smaller_than_the_number_of_images_has_one_location_each():
    bank, _ = drawn(cached_features(numbered(10, [(4, 4), (2, 3)])), 7)
    assert bank.shape == (7, 2)
    assert len(set(bank[:, 0])) == 7


def test_a_bank_larger_than_the_training_set_has_all_of_it():
    first, second = drawn(cached_features(numbered(3, [(4, 4), (2, 3)])), 1000)
    assert len(np.unique(first, axis=0)) == len(first) == 3 * 16
    assert len(np.unique(second, axis=0)) == len(second) == 3 * 6


def test_a_bank_depends_on_its_seed():
    training = cached_features(numbered(10, [(4, 4)]))
    (one,), (same,), (other,) = (drawn(training, 20, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_a_bank_does_not_depend_on_the_batch_size():
    training = cached_features(numbered(10, [(4, 4), (2, 3)]))
    for one, other in zip(drawn(training, 20), drawn(training, 20, batch_size=7), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_small_bank_computes_few_full_batches():
    sizes = []

    def latents(maps, valid):
        assert len(valid) == len(maps[0])
        sizes.append(len(maps[0]))
        return maps

    maps, valid = numbered(100, [(4, 4)]), np.ones((100, 16, 16), bool)
    (bank,) = draw(latents, cached_features(maps, valid), 10, batch_size=4, seed=0)
    assert sizes == [4, 4, 2]
    assert len(set(bank[:, 0])) == 10


def test_a_bank_has_no_locations_in_padding():
    valid = np.zeros((6, 16, 16), bool)
    valid[:, 4:12] = True  # rows 1 and 2 of 4
    training = cached_features(numbered(6, [(4, 4)]), valid)
    for size, each in ((36, 6), (1000, 8)):
        (bank,) = drawn(training, size)
        assert set(bank[:, 1]) <= set(range(4, 12))
        np.testing.assert_array_equal(np.bincount(bank[:, 0].astype(int)), each)


def test_a_location_between_two_clusters_is_far_from_the_bank():
    """At the origin the Gaussian is at its densest, though no latent is ever there."""
    bank = np.repeat([[3.0, 0.0], [-3.0, 0.0]], 5, axis=0).astype(np.float16)
    between, normal = np.zeros((1, 2, 2, 2), np.float32), np.full((1, 2, 2, 2), [3.0, 0.0], "f")
    far, near = (nearest_squared_distances(z, bank) for z in (between, normal))
    np.testing.assert_allclose(far, 9, atol=1e-5)
    np.testing.assert_allclose(near, 0, atol=1e-5)


def covering_radius(rows, bank):
    """Largest distance of a row to its nearest row of the bank."""
    return np.linalg.norm(rows[:, None] - np.float64(bank), axis=-1).min(1).max()


@pytest.mark.parametrize("channels", [3, 140])  # 140 are projected
def test_a_coreset_covers_rare_regions(channels):
    """Two of 2,000 locations are rare: a coreset of 20 has one of them, as Gonzalez' bound says."""
    maps = RNG.normal(size=(20, 10, 10, channels)).astype(np.float32)
    maps[3, 4, 4:6] = 50 + maps[3, 4, 4]
    maps[3, 4, 5] += 0.1  # they are near each other
    training = cached_features((maps,))
    (bank,) = draw_coresets(lambda m, _: m, training, 20, batch_size=8, seed=0, label="")
    assert bank.shape == (20, channels)
    assert bank.dtype == np.float16
    assert len(np.unique(bank, axis=0)) == 20
    rows = maps.reshape(-1, channels)
    assert all(np.abs(rows - row).max(-1).min() < 0.05 for row in bank)  # they are rows, rounded
    random = rows[np.random.default_rng(0).choice(len(rows), 20, replace=False)]
    assert np.sum(bank.mean(-1) > 25) == 1
    assert covering_radius(rows, bank) < 0.5 * covering_radius(rows, random)


def test_a_coreset_of_few_rows_has_them_all():
    training = cached_features(numbered(3, [(4, 4)]))
    (bank,) = draw_coresets(lambda m, _: m, training, 48, batch_size=8, seed=0, label="")
    assert len(np.unique(bank, axis=0)) == len(bank) == 48
