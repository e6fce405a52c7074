"""Test images that differ as a whole from the training images are found, others are not."""

import numpy as np
import pytest
from scipy.stats import binomtest

from fastflow_jax.features import shift
from fastflow_jax.features.extract import image_means

RNG = np.random.default_rng(0)


def maps_of(vectors):
    """Features [N, 2, 2, C] of one scale whose means are `vectors`, [N, C]."""
    return (np.tile(vectors[:, None, None].astype(np.float32), (1, 2, 2, 1)),)


def found(train, test, held=None):
    holdout = None if held is None else maps_of(held)
    return shift.find(maps_of(train), holdout, image_means(maps_of(test)))


def test_counts_and_p_value_follow_their_definition():
    train, test = RNG.normal(3, 2, (60, 5)), RNG.normal(4, 2, (50, 5))
    result = found(train, test)
    a, b = ((x - train.mean(0)) / train.std(0) for x in (train, test))
    own = [np.linalg.norm(np.delete(a, i, 0) - row, axis=1).min() for i, row in enumerate(a)]
    nearest = np.array([np.linalg.norm(a - row, axis=1).min() for row in b])
    assert result.test_images == 50
    assert result.further == np.sum(nearest > np.median(own))
    expected = binomtest(50 - result.further, 50, 1 / 8, alternative="less").pvalue
    assert result.p_value == pytest.approx(expected)


@pytest.mark.parametrize("defective", [0, 30, 45])
def test_normal_images_among_defective_ones_are_no_shift(defective):
    train, test = RNG.normal(size=(100, 6)), RNG.normal(size=(60, 6))
    test[:defective] += 20
    result = found(train, test)
    assert result.message is None
    assert result.further >= defective


def test_a_shift_of_all_images_is_reported():
    train, test = RNG.normal(size=(100, 6)), RNG.normal(size=(60, 6)) + 3
    assert "60 of 60 are further from the training images" in found(train, test).message


def test_few_images_are_not_reported():
    assert found(RNG.normal(size=(100, 6)), RNG.normal(size=(34, 6)) + 9).message is None


def test_training_images_of_the_same_part_do_not_make_others_look_shifted():
    parts = RNG.normal(size=(120, 6))
    train = parts[:50].repeat(4, 0) + 0.01 * RNG.normal(size=(200, 6))
    assert found(train, parts[70:]).message is not None
    assert found(train, parts[70:], held=parts[50:70]).message is None


def test_constant_images_are_no_shift():
    assert found(np.ones((9, 3)), np.ones((50, 3))).further == 0
