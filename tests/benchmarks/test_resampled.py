"""Metrics from counts of pixels against exact ones, and intervals against a plain bootstrap."""

import pathlib
import sys

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from fastflow_jax.evaluation.evaluate import Scored, measure

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import resampled


def scored_images(n=40, side=64, strength=4.0, seed=0, valid=None):
    """Smooth anomaly maps with long tails; every second image has one to three rectangles."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, side, side), bool)
    for mask in masks[::2]:
        for _ in range(rng.integers(1, 4)):
            y, x = rng.integers(6, side - side // 5, 2)
            height, width = rng.integers(1, side // 5, 2)
            mask[y : y + height, x : x + width] = True
    maps = gaussian_filter(rng.normal(size=masks.shape), (0, 2, 2)) * 6
    maps = np.exp(maps + strength * gaussian_filter(masks.astype(float), (0, 2, 2)))
    scores = maps.max((1, 2)).astype(np.float32)
    labels = masks.any((1, 2)).astype(np.int32)
    return Scored(scores, labels, maps.astype(np.float32), masks, valid)


def repeated(scored, images):
    """The metrics of images that are drawn by index, some more than once."""
    fields = [None if field is None else field[images] for field in scored]
    figures = measure(Scored(*fields))
    return [figures[metric] for metric in resampled.METRICS]


def from_counts(scored, weights):
    found = resampled.measure(resampled.count(scored), weights)
    return np.stack([found[metric] for metric in resampled.METRICS], axis=1)


@pytest.mark.parametrize("strength", [0.5, 4.0, 20.0])
def test_metrics_from_counts_equal_the_exact_ones(strength):
    scored = scored_images(strength=strength)
    (found,) = from_counts(scored, np.ones((1, 40), np.float32))
    assert found == pytest.approx(repeated(scored, np.arange(40)), abs=5e-4)


def test_metrics_of_resamples_equal_those_of_repeated_images():
    scored = scored_images()
    weights = resampled.resamples(scored.labels, 6, 3)
    np.testing.assert_array_equal(weights[0], 1)
    assert len(np.unique(weights, axis=0)) == 6
    np.testing.assert_array_equal(weights[:, scored.labels == 1].sum(1), 20)
    np.testing.assert_array_equal(weights.sum(1), 40)
    for row, found in zip(weights, from_counts(scored, weights), strict=True):
        images = np.repeat(np.arange(40), row.astype(int))
        assert found == pytest.approx(repeated(scored, images), abs=2e-3)


def test_ties_count_half_in_the_auroc_of_images():
    labels = np.array([0, 0, 1, 1], np.int32)
    scored = Scored(np.array([1, 2, 2, 3], np.float32), labels, None, None, None)
    found = resampled.measure(resampled.count(scored), np.ones((1, 4), np.float32))
    assert found == {"image_auroc": pytest.approx([3.5 / 4])}


def test_areas_are_exact_for_tied_pixels():
    scored = scored_images()
    tied = scored._replace(maps=np.round(np.log(scored.maps)))
    assert len(np.unique(tied.maps)) == 12
    (found,) = from_counts(tied, np.ones((1, 40), np.float32))
    assert found[:4] == pytest.approx(repeated(tied, np.arange(40))[:4], abs=1e-6)


def test_padding_is_not_counted():
    valid = np.ones((40, 64, 64), bool)
    valid[:, :6] = False
    scored = scored_images(valid=valid)
    scored.maps[~valid] = 1e6
    (found,) = from_counts(scored, np.ones((1, 40), np.float32))
    assert found == pytest.approx(repeated(scored, np.arange(40)), abs=5e-4)


def test_masks_of_one_class_have_no_pixel_metrics():
    scored = scored_images()
    counts = resampled.count(scored._replace(masks=np.zeros_like(scored.masks)))
    assert resampled.measure(counts, np.ones((1, 40), np.float32)).keys() == {"image_auroc"}


def plain_bootstrap(sets, metric, draws):
    """Percentiles of the mean difference of two detectors, image by image and set by set."""
    rng, steps = np.random.default_rng(7), []
    for _ in range(draws):
        differences = []
        for one, other in [sets[i] for i in rng.integers(len(sets), size=len(sets))]:
            strata = [np.flatnonzero(one.labels == label) for label in (0, 1)]
            images = np.concatenate([rng.choice(stratum, len(stratum)) for stratum in strata])
            place = resampled.METRICS.index(metric)
            differences.append(repeated(one, images)[place] - repeated(other, images)[place])
        steps.append(np.mean(differences))
    return np.percentile(steps, (2.5, 97.5))


@pytest.mark.parametrize("metric", ["image_auroc", "aupro"])
def test_intervals_equal_those_of_a_plain_bootstrap(metric):
    pairs = [((0, 1.0, 2.0), 12), ((1, 2.0, 2.2), 20), ((2, 0.5, 1.5), 16)]
    sets = [
        [scored_images(n, 24, strength, seed + 10 * i) for i, strength in enumerate(strengths)]
        for (seed, *strengths), n in pairs
    ]
    for one, other in sets:  # the same images
        assert (one.labels == other.labels).all()
    differences = []
    for one, other in sets:
        weights = resampled.resamples(one.labels, 2001, 0)
        both = [resampled.measure(resampled.count(s), weights)[metric] for s in (one, other)]
        differences.append(both[0] - both[1])
    step, low, high = resampled.over_sets(differences, 0)
    assert step == pytest.approx(np.mean([d[0] for d in differences]))
    expected = plain_bootstrap(sets, metric, 300)
    assert (low, high) == pytest.approx(expected, abs=0.15 * (expected[1] - expected[0]))
    one_set = resampled.over_images(differences[0])
    assert one_set[1:] == pytest.approx(np.percentile(differences[0][1:], (2.5, 97.5)))


def test_an_interval_over_sets_is_wider_than_that_of_equal_sets():
    rng = np.random.default_rng(0)
    images = rng.normal(0, 0.01, (4, 500))
    sets = images + np.array([-1, 0, 1, 2])[:, None]
    step, low, high = resampled.over_sets(list(sets), 0)
    assert step == pytest.approx(sets[:, 0].mean())
    # The mean of four draws of (-1, 0, 1, 2): standard deviation sqrt(1.25 / 4).
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(1.25 / 4), rel=0.1)
    _, low, high = resampled.over_sets(list(images), 0)
    assert high - low == pytest.approx(2 * 1.96 * 0.005, rel=0.15)


def test_equal_values_share_a_rank():
    values = np.array([[0.9, 0.8, 0.8], [0.1, 0.5, 0.3]])
    np.testing.assert_array_equal(resampled.mean_ranks(values), [2.0, 1.75, 2.25])
