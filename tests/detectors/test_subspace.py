"""The subspace detector against scikit-learn's principal components."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from fastflow_jax.config import default, fill
from fastflow_jax.detectors.subspace import METHOD, fit, residual_basis
from fastflow_jax.features.extract import cached_features
from fastflow_jax.training.context import FitContext

SHAPES = [(6, 5, 8), (3, 2, 12)]


def config(**fields):
    c = default()
    c.detector, c.image_size, c.batch_size = "subspace", (24, 20), 4
    c.layers = ("blocks.1", "blocks.2")
    c.update_from_flattened_dict(fields)
    return fill(c)


def features(n, seed=0):
    """Features of few directions with a little noise."""
    rng = np.random.default_rng(seed)
    mixing = [np.random.default_rng(i).normal(size=(3, s[-1])) for i, s in enumerate(SHAPES)]
    return tuple(
        (1 + rng.normal(size=(n, *s[:2], 3)) @ m + 0.1 * rng.normal(size=(n, *s))).astype("f")
        for s, m in zip(SHAPES, mixing, strict=True)
    )


@pytest.mark.parametrize("variance", [0.5, 0.9, 0.99])
def test_energies_are_the_residuals_of_principal_components(tmp_path, variance):
    train, test = features(20), features(4, seed=1)
    context = FitContext(
        config(**{"subspace.variance": variance}), cached_features(train), tmp_path
    )
    maps = fit(context).location_maps(test)
    for found, x, t in zip(maps, test, train, strict=True):
        rows = t.reshape(-1, t.shape[-1]).astype(np.float64)
        pca = PCA(n_components=variance, svd_solver="full").fit(rows)
        flat = x.reshape(-1, x.shape[-1])
        left = flat - pca.inverse_transform(pca.transform(flat))
        expected = (left**2).mean(-1).reshape(found.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_one_direction_is_left_if_all_variance_is_explained():
    basis = residual_basis(np.diag([3.0, 0.5, 2.0]), 1.0)
    np.testing.assert_allclose(np.abs(basis), [[0], [1], [0]])


def test_a_loaded_scorer_gives_the_same_scores(tmp_path):
    held_out, test = features(5, seed=2), features(3, seed=1)
    scorer = fit(FitContext(config(), cached_features(features(9)), tmp_path, holdout=held_out))
    loaded = METHOD.load(scorer.config, SHAPES, METHOD.read(scorer.config, tmp_path))
    for one, other in zip(scorer.score(test), loaded.score(test), strict=True):
        np.testing.assert_array_equal(one, other)
