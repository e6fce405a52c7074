"""Difference of two AUROCs on the same images, with its interval."""

import json
import pathlib
import sys

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import paired


@pytest.fixture
def scores():
    """Labels, and scores of two detectors with two seeds each, with ties."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    common = labels + rng.normal(size=300)
    one, other = (common + noise * rng.normal(size=(2, 300)) for noise in (0.5, 0.9))
    return labels, one.round(1), other.round(1)


def mean_auroc(labels, scores):
    return np.mean([roc_auc_score(labels, row) for row in scores])


def test_scores_of_a_run_inside_the_run_are_ignored(tmp_path):
    def write(folder, scores):
        folder.mkdir(parents=True)
        images = [{"name": f"{i}", "label": i % 2, "score": s} for i, s in enumerate(scores)]
        (folder / "scores.json").write_text(json.dumps({"images": images}))

    write(tmp_path / "seed_0", [1.0, 2.0])
    write(tmp_path / "seed_1", [3.0, 4.0])
    write(tmp_path / "inner" / "seed_0", [5.0, 6.0])
    (tmp_path / "inner" / "config.json").touch()
    images, scores = paired.read_scores(tmp_path)
    assert images == [("0", 0), ("1", 1)]
    np.testing.assert_array_equal(scores, [[1, 2], [3, 4]])


def test_aurocs_are_scikit_learns(scores):
    labels, one, other = scores
    first, second, low, high = paired.difference(one, other, labels)
    assert first == pytest.approx(mean_auroc(labels, one), abs=1e-12)
    assert second == pytest.approx(mean_auroc(labels, other), abs=1e-12)
    assert (low + high) / 2 == pytest.approx(first - second)


def test_the_interval_agrees_with_the_bootstrap(scores):
    labels, one, other = scores
    _, _, low, high = paired.difference(one, other, labels)

    def mean_share(scores, normal, anomalous):  # of pairs in the right order; the mean AUROC
        above = scores[:, anomalous, None] - scores[:, None, normal]
        return (np.sign(above).mean() + 1) / 2

    def drawn(normal, anomalous):
        return mean_share(one, normal, anomalous) - mean_share(other, normal, anomalous)

    # The two classes are drawn separately, as in DeLong et al.
    boot = stats.bootstrap(
        (np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)),
        drawn,
        n_resamples=1000,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(1),
    )
    assert low == pytest.approx(boot.confidence_interval.low, abs=0.006)
    assert high == pytest.approx(boot.confidence_interval.high, abs=0.006)
    assert high - low > 0.02  # wider than the tolerance
