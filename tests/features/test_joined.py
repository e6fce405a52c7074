"""Features of several products as those of one training."""

import numpy as np
import pytest

from fastflow_jax.errors import InputError
from fastflow_jax.features.extract import TrainingFeatures, cached_features
from fastflow_jax.features.joined import joined, joined_held_out, split_products

RNG = np.random.default_rng(0)


def maps(n):
    return tuple(RNG.normal(size=(n, side, side, 2)).astype("f") for side in (4, 2))


def test_rows_are_those_of_the_concatenated_arrays_and_end_with_the_product():
    parts = [maps(3), maps(2), maps(4)]
    masks = [RNG.random((len(part[0]), 8, 8)) > 0.5 for part in parts]
    features = joined([cached_features(*each) for each in zip(parts, masks, strict=True)])
    assert features.n == 10  # the second product has one image less than the mean
    assert features.shapes == ((4, 4, 2), (2, 2, 2), ())
    index = np.array([[9, 0, 3], [5, 4, 2]])
    row = np.array([0, 1, 2, 3, 4, 3, 5, 6, 7, 8])
    for rows, found in zip(index, features.stream(0, index), strict=True):
        scales, product = split_products(found)
        for scale, whole in zip(scales, zip(*parts, strict=True), strict=True):
            np.testing.assert_array_equal(scale, np.concatenate(whole)[row[rows]])
        np.testing.assert_array_equal(product, np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])[rows])
    assert features.valid is not None
    np.testing.assert_array_equal(np.asarray(features.valid), np.concatenate(masks)[row])


def test_held_out_images_are_joined_if_there_are_any():
    parts = [maps(2), None, maps(1)]
    found, valid = joined_held_out([(part, None) for part in parts])
    assert valid is None
    scales, product = split_products(found)
    np.testing.assert_array_equal(product, [0, 0, 2])
    np.testing.assert_array_equal(scales[0], np.concatenate([parts[0][0], parts[2][0]]))
    assert joined_held_out([(None, None)]) == (None, None)


def test_features_without_a_product_are_unchanged():
    part = maps(2)
    assert split_products(part) == (part, None)


def test_features_that_change_in_every_epoch_are_refused():
    changing = TrainingFeatures(1, ((4, 4, 2),), lambda *_: iter(()), lambda: (), None)
    with pytest.raises(InputError, match=r"augment\.copies"):
        joined([changing])
