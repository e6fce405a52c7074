"""Scores as a pure function of pixels."""

import jax
import numpy as np
import pytest

from fastflow_jax.data.transforms import resize
from fastflow_jax.scoring import in_batches, resize_pixels


@pytest.mark.parametrize("size", [(40, 64), (33, 20), (7, 90), (64, 64), (130, 31), (48, 64)])
@pytest.mark.parametrize("smooth", [True, False])
def test_pixels_are_resized_as_by_pillow_to_within_a_grey_level(size, smooth):
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    if smooth:
        images = np.cumsum(images, axis=2, dtype=np.uint32) // (128 * size[1] // 64 + 1) % 256
        images = images.astype(np.uint8)
    found = np.asarray(jax.jit(resize_pixels, static_argnums=1)(images, (48, 64)))
    expected = np.stack([resize(image, (48, 64)) for image in images])
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.05


def test_few_images_are_padding():
    sizes = []

    def double(size, array):
        sizes.append((size, len(array)))
        return 2 * array

    for n, expected in {
        1: [1],
        3: [1, 1, 1],
        5: [8],
        9: [8, 1],
        16: [8, 8],
        24: [8, 8, 8],
        31: [8, 8, 8, 8],
        39: [32, 8],
    }.items():
        sizes.clear()
        np.testing.assert_array_equal(in_batches(double, np.arange(n)), 2 * np.arange(n))
        assert [size for size, _ in sizes] == expected
        assert sum(rows for _, rows in sizes) == n
