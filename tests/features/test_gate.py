"""The gate: which product an image shows, and whether it shows one at all."""

import numpy as np
import pytest

from fastflow_jax.errors import InputError
from fastflow_jax.features.gate import Gate, find_products
from fastflow_jax.features.shift import Reference

RNG = np.random.default_rng(0)
CENTRES = np.eye(3, 6) * 40


def means(product, n=30):
    """Means of n images around the centre of a product."""
    return CENTRES[product] + RNG.normal(size=(n, 6))


def references(*products):
    found = [Reference.fit(means(product)) for product in products]
    return [each for each in found if each is not None]


def test_images_are_recognised_and_those_of_another_product_are_unknown():
    gate = Gate.fit(references(0, 1))
    product, is_known = gate(np.concatenate([means(0, 5), means(1, 5), means(2, 5)]))
    np.testing.assert_array_equal(product[:10], [0] * 5 + [1] * 5)
    np.testing.assert_array_equal(is_known, [True] * 10 + [False] * 5)


def test_an_unusual_image_of_a_product_is_known():
    gate = Gate.fit(references(0, 1))
    unusual = CENTRES[0] + 6 * RNG.normal(size=(20, 6))  # six times the usual deviation
    product, is_known = gate(unusual)
    assert (product == 0).all()
    assert is_known.all()


def test_similar_products_are_known():
    rows = [means(0), means(0) + 0.5]
    _, is_known = Gate.of_means(rows)(np.concatenate(rows))
    assert is_known.all()


def test_one_product_needs_no_gate():
    with pytest.raises(InputError, match="at least two products"):
        Gate.fit(references(0))


def test_products_are_found_in_the_order_of_their_first_images():
    together = np.concatenate([means(2, 12), means(0, 40), means(1, 15)])
    groups = find_products(together)
    np.testing.assert_array_equal(groups, [0] * 12 + [1] * 40 + [2] * 15)


def test_few_images_are_one_product():
    np.testing.assert_array_equal(find_products(means(0, 12)), [0] * 12)


def test_images_of_one_kind_are_one_product():
    np.testing.assert_array_equal(find_products(means(0, 60)), [0] * 60)


def test_an_image_outside_the_groups_is_in_the_nearest():
    stray = CENTRES[1] + [0, 12, 0, 0, 0, 0]
    groups = find_products(np.concatenate([means(0, 20), means(1, 20), [stray]]))
    np.testing.assert_array_equal(groups, [0] * 20 + [1] * 21)
