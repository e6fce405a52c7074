"""Cross-fitting against detectors that are trained by hand without the images that they score."""

import numpy as np
import pytest

from fastflow_jax.config import default, fill
from fastflow_jax.detectors.base import method
from fastflow_jax.errors import InputError
from fastflow_jax.evaluation.folds import cross_fit
from fastflow_jax.features.extract import cached_features, recomputed_features
from fastflow_jax.training.context import FitContext

SHAPES = [(6, 5, 8), (3, 2, 12)]


def config(detector="knn", folds=5, **fields):
    c = default()
    c.detector, c.image_size, c.batch_size = detector, (24, 20), 4
    c.layers = ("blocks.1", "blocks.2")
    c.data.holdout, c.data.folds = 0.0, folds
    c.update_from_flattened_dict(fields)
    return fill(c)


def features(n, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(3, 1, (n, *shape)).astype(np.float32) for shape in SHAPES)


def fitted(c, directory, train, valid=None, n=None, groups=None):
    """The scorer of `cross_fit`, and the scores of the images."""
    context = FitContext(c, cached_features(train, valid), directory)
    scorer = method(c.detector).fit(context)
    return cross_fit(context, scorer, n or len(train[0]), groups)


def energies(x, others):
    """Squared distances [h, w] to the nearest whitened vector of other images, per channel."""
    rows = others.reshape(-1, x.shape[-1]).astype(np.float64)
    mean, std = rows.mean(0), rows.std(0)
    values, vectors = np.linalg.eigh(np.corrcoef(rows.T))
    matrix = vectors / np.sqrt(values + 0.5 * values.mean()) @ vectors.T / std[:, None]
    steps = ((x - mean) @ matrix)[..., None, :] - (rows - mean) @ matrix
    return (steps**2).sum(-1).min(-1) / x.shape[-1]


def test_a_scorer_is_calibrated_on_energies_without_the_image_itself(tmp_path):
    train = features(5)
    scorer, held_out = fitted(config(**{"knn.points": 10**6}), tmp_path, train)
    for i, maps in enumerate(train):
        found = [energies(x, np.delete(maps, j, 0)) for j, x in enumerate(maps)]
        assert scorer.calibration.scale_mean[i] == pytest.approx(np.mean(found), rel=0.02)
        assert scorer.calibration.scale_std[i] == pytest.approx(np.std(found), rel=0.02)
    assert held_out.scores.shape == (5,)
    read = method("knn").read(scorer.config, tmp_path)
    np.testing.assert_array_equal(read["calibration/scale_mean"], scorer.calibration.scale_mean)
    assert not (tmp_path / "folds").exists()


def test_a_detector_without_a_calibration_scores_images_that_it_does_not_know(tmp_path):
    train, c = features(4), config("patchcore", folds=2)
    (tmp_path / "all").mkdir()
    _, held_out = fitted(c, tmp_path / "all", train)
    for i in range(4):
        (tmp_path / str(i)).mkdir()
        others = tuple(m[1 - i % 2 :: 2] for m in train)  # image i is in fold i % 2
        alone = FitContext(c, cached_features(others), tmp_path / str(i))
        expected, _ = method("patchcore").fit(alone).score(tuple(m[i : i + 1] for m in train))
        assert held_out.scores[i] == pytest.approx(expected[0], rel=1e-4)


def test_images_of_one_part_are_in_one_fold(tmp_path):
    train = tuple(np.repeat(m, 2, 0) for m in features(4))  # each image twice
    parts = np.repeat(np.arange(4), 2)
    c = config(folds=8, **{"knn.points": 10**6})
    (tmp_path / "apart").mkdir()
    together, held_out = fitted(c, tmp_path, train, groups=parts)
    apart, _ = fitted(c, tmp_path / "apart", train)
    assert np.all(apart.calibration.scale_mean < 1e-3)  # a twin is in the bank
    assert np.all(together.calibration.scale_mean > 0.1)
    assert held_out.n_parts == 4


def test_copies_of_an_image_are_left_out_with_it(tmp_path):
    train = features(4)
    copied = tuple(np.tile(m, (3, 1, 1, 1)) for m in train)
    c = config(folds=4, **{"knn.points": 10**6})
    (tmp_path / "copied").mkdir()
    _, once = fitted(c, tmp_path, train)
    _, found = fitted(c, tmp_path / "copied", copied, n=4, groups=np.tile(np.arange(4), 3))
    np.testing.assert_allclose(found.scores, once.scores, rtol=1e-3, atol=1e-4)


def test_padding_does_not_affect_the_scores(tmp_path):
    train, valid = features(4), np.ones((4, 24, 20), bool)
    valid[:, :8] = False
    spoilt = tuple(m.copy() for m in train)
    for m in spoilt:
        m[:, : m.shape[1] // 3] += 50.0
    found = []
    for i, maps in enumerate((train, spoilt)):
        (tmp_path / str(i)).mkdir()
        found.append(fitted(config(), tmp_path / str(i), maps, valid)[1])
    np.testing.assert_allclose(found[0].scores, found[1].scores, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[0].tails, found[1].tails, rtol=1e-3, atol=1e-3)


def test_a_single_image_has_no_score(tmp_path):
    scorer, held_out = fitted(config(), tmp_path, features(1))
    assert held_out is None
    assert np.all(scorer.calibration.scale_mean == 0)


def test_features_that_change_in_every_epoch_are_refused(tmp_path):
    def batches_of(epoch, rows, size):
        yield type("Batch", (), {"image": rows, "valid": None})

    changing = recomputed_features(4, batches_of, lambda rows: features(len(rows)), 4)
    context = FitContext(config(), changing, tmp_path)
    with pytest.raises(InputError, match=r"needs cached features. Set config.augment.copies"):
        cross_fit(context, method("knn").fit(context), 4)
