"""The Gaussian detector against Mahalanobis distances in float64."""

import numpy as np
import pytest

from fastflow_jax.config import default, fill
from fastflow_jax.detectors.gaussian import METHOD, fit
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


@pytest.mark.parametrize("channels", [100, 5])
def test_each_location_may_have_its_own_gaussian(tmp_path, channels):
    train, test = features(40), features(4, seed=1)
    train[0][:, 2, 3] *= 4
    valid = np.ones((40, 24, 20), bool)
    valid[30:, 8:] = False  # the lower rows of the last ten images are padding
    for m in train:
        m[30:, m.shape[1] // 3 :] = 1e3
    fields = {"gaussian.per_location": True, "gaussian.channels": channels}
    scorer = fit(FitContext(config(**fields), cached_features(train, valid), tmp_path))
    for i, (found, x, t) in enumerate(zip(scorer.location_maps(test), test, train, strict=True)):
        chosen = scorer.variables[f"channels_{i}"]
        assert len(np.unique(chosen)) == len(chosen) == min(channels, t.shape[-1])
        for row, column in ((0, 1), (2, 1)):
            rows = t[: 30 if row else 40, row, column][:, chosen].astype(np.float64)
            std = rows.std(0)
            correlation = np.corrcoef(rows.T) + 0.5 * np.eye(len(std))
            centred = (x[:, row, column][:, chosen] - rows.mean(0)) / std
            expected = np.einsum("...i,ij,...j", centred, np.linalg.inv(correlation), centred)
            np.testing.assert_allclose(found[:, row, column], expected / len(std), rtol=2e-3)


@pytest.mark.parametrize("per_location", [False, True])
def test_a_loaded_scorer_gives_the_same_scores(tmp_path, per_location):
    held_out, test = features(5, seed=2), features(3, seed=1)
    c = config(**{"gaussian.per_location": per_location})
    scorer = fit(FitContext(c, cached_features(features(9)), tmp_path, holdout=held_out))
    loaded = METHOD.load(scorer.config, SHAPES, METHOD.read(scorer.config, tmp_path))
    for one, other in zip(scorer.score(test), loaded.score(test), strict=True):
        np.testing.assert_array_equal(one, other)
