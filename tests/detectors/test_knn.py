"""The k-NN detector against scikit-learn's neighbours and numpy's whitening."""

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from fastflow_jax.config import default, fill
from fastflow_jax.detectors.knn import METHOD, fit
from fastflow_jax.features.extract import cached_features
from fastflow_jax.training.context import FitContext

SHAPES = [(6, 5, 8), (3, 2, 12)]


def config(**fields):
    c = default()
    c.detector, c.image_size, c.batch_size = "knn", (24, 20), 4
    c.layers = ("blocks.1", "blocks.2")
    c.update_from_flattened_dict(fields)
    return fill(c)


def features(n, seed=0):
    """Correlated features with a mean."""
    rng = np.random.default_rng(seed)
    mixing = [np.random.default_rng(i).normal(size=(s[-1], s[-1])) for i, s in enumerate(SHAPES)]
    return tuple(
        (3 + rng.normal(size=(n, *shape)) @ m).astype(np.float32)
        for shape, m in zip(SHAPES, mixing, strict=True)
    )


def fitted(directory, train, holdout=None, valid=None, holdout_valid=None, **fields):
    context = FitContext(
        config(**fields),
        cached_features(train, valid),
        directory,
        holdout=holdout,
        holdout_valid=holdout_valid,
    )
    return fit(context)


def whitened(x, train):
    """Half-way ZCA whitening in float64."""
    rows = train.reshape(-1, train.shape[-1]).astype(np.float64)
    mean, std = rows.mean(0), rows.std(0)
    values, vectors = np.linalg.eigh(np.corrcoef(rows.T))
    root = vectors / np.sqrt(values + 0.5 * values.mean())
    return (x - mean) / std @ root @ vectors.T


@pytest.mark.parametrize("k", [1, 3])
def test_energies_are_squared_distances_to_the_nearest_whitened_features(tmp_path, k):
    train, test = features(10), features(5, seed=1)
    fields = {"knn.neighbours": k, "knn.points": 10**6}  # the bank has all training locations
    scorer = fitted(tmp_path, train, **fields)
    for found, x, t in zip(
        scorer.location_maps(tuple(m[:4] for m in test)), test, train, strict=True
    ):
        rows = whitened(t, t).reshape(-1, t.shape[-1])
        search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(rows)
        distances, _ = search.kneighbors(whitened(x[:4], t).reshape(-1, t.shape[-1]))
        expected = (distances**2).mean(1) / t.shape[-1]
        np.testing.assert_allclose(found.ravel(), expected, rtol=5e-3, atol=5e-3)  # float16 bank


def test_the_bank_is_a_sample_of_the_size_asked_for(tmp_path):
    scorer = fitted(tmp_path, features(10), **{"knn.points": 40})
    assert [len(scorer.variables[f"bank_{i}"]) for i in range(2)] == [40, 40]


def test_a_coreset_has_rare_normal_features(tmp_path):
    """One image of 400 differs: few random rows, here none, are of it, but one of the coreset."""
    train = features(400)
    for m in train:
        m[7] += 30.0
    for name, is_coreset in (("random", False), ("coreset", True)):
        (tmp_path / name).mkdir()
        scorer = fitted(tmp_path / name, train, **{"knn.points": 40, "knn.coreset": is_coreset})
        energies = [m.mean((1, 2)) for m in scorer.location_maps(tuple(m[5:9] for m in train))]
        for of_scale in energies:
            assert (of_scale[2] > 3 * of_scale[[0, 1, 3]].max()) != is_coreset


def test_other_features_score_higher_than_normal_ones(tmp_path):
    scorer = fitted(tmp_path, features(20), holdout=features(6, seed=2))
    normal, other = features(4, seed=3), tuple(m.copy() for m in features(4, seed=3))
    for m in other:
        m[:, 1, 1] += 8.0
    (low, _), (high, _) = scorer.score(normal), scorer.score(other)
    assert high.min() > low.max()
    for energies in scorer.location_maps(other):
        assert np.all(energies.reshape(4, -1).argmax(1) == energies.shape[2] + 1)  # row 1, column 1


def test_a_loaded_scorer_gives_the_same_scores(tmp_path):
    train, test = features(8), features(3, seed=1)
    scorer = fitted(tmp_path, train, holdout=features(5, seed=2))
    loaded = METHOD.load(scorer.config, SHAPES, METHOD.read(scorer.config, tmp_path))
    for one, other in zip(scorer.score(test), loaded.score(test), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("average", [False, True])
def test_padding_does_not_affect_scores(tmp_path, average):
    train, test = features(8), features(4, seed=1)
    valid = np.ones((8, 24, 20), bool)
    valid[:, :8] = False  # two rows of six, and one of three
    spoilt = [tuple(m.copy() for m in maps) for maps in (train, test)]
    for maps in spoilt:
        for m in maps:
            m[:, : m.shape[1] // 3] += 50.0
    results = []
    for i, (a, b) in enumerate([(train, test), spoilt]):
        directory = tmp_path / str(i)
        directory.mkdir()
        scorer = fitted(directory, a, valid=valid, **{"knn.average": average})
        results.append(scorer.score(b, valid[:4]))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
