"""The Gaussian detector against Mahalanobis distances in float64."""

import numpy as np
import pytest

from fastflow_jax.config import default, fill
from fastflow_jax.detectors.gaussian import fit, load
from fastflow_jax.features.extract import cached_features
from fastflow_jax.training.context import FitContext

SHAPES = [(6, 5, 8), (3, 2, 12)]


def config(**fields):
    c = default()
    c.detector, c.image_size, c.batch_size = "gaussian", (24, 20), 4
    c.layers = ("blocks.1", "blocks.2")
    c.update_from_flattened_dict(fields)
    return fill(c)


def features(n, seed=0):
    rng = np.random.default_rng(seed)
    mixing = [np.random.default_rng(i).normal(size=(s[-1], s[-1])) for i, s in enumerate(SHAPES)]
    return tuple(
        (3 + rng.normal(size=(n, *shape)) @ m).astype(np.float32)
        for shape, m in zip(SHAPES, mixing, strict=True)
    )


@pytest.mark.parametrize("shrinkage", [1e-6, 0.5])
def test_energies_are_squared_mahalanobis_distances(tmp_path, shrinkage):
    train, test = features(30), features(4, seed=1)
    context = FitContext(
        config(**{"gaussian.shrinkage": shrinkage}), cached_features(train), tmp_path
    )
    maps = fit(context).location_maps(test)
    for found, x, t in zip(maps, test, train, strict=True):
        rows = t.reshape(-1, t.shape[-1]).astype(np.float64)
        std = rows.std(0)
        # The mean variance of standardised channels is 1.
        correlation = np.corrcoef(rows.T) + shrinkage * np.eye(len(std))
        centred = (x - rows.mean(0)) / std
        expected = np.einsum("...i,ij,...j", centred, np.linalg.inv(correlation), centred)
        np.testing.assert_allclose(found, expected / len(std), rtol=1e-3)


def test_a_loaded_scorer_gives_the_same_scores(tmp_path):
    held_out, test = features(5, seed=2), features(3, seed=1)
    scorer = fit(FitContext(config(), cached_features(features(9)), tmp_path, holdout=held_out))
    loaded = load(scorer.config, SHAPES, tmp_path)
    for one, other in zip(scorer.score(test), loaded.score(test), strict=True):
        np.testing.assert_array_equal(one, other)
