"""Scores and metrics of a split, with and without masks and padding."""

import numpy as np
import pytest

from fastflow_jax.evaluation import metrics
from fastflow_jax.evaluation.evaluate import measure, score_split
from fastflow_jax.features.extract import FeatureBatch

RNG = np.random.default_rng(0)
N = 5
MAPS = RNG.normal(size=(N, 6, 8)).astype(np.float32)
MASKS = RNG.random((N, 6, 8)) > 0.7
LABELS = np.array([0, 1, 1, 0, 1], np.int32)


def split(masks=None, valid=None):
    """Batches of two; the "features" are indices of maps."""
    rows = [np.arange(i, min(i + 2, N)) for i in range(0, N, 2)]
    return [
        FeatureBatch(
            features=r,
            mask=None if masks is None else masks[r],
            label=LABELS[r],
            index=r,
            valid=None if valid is None else valid[r],
        )
        for r in rows
    ]


def score(maps):
    return lambda rows, valid=None: (maps[rows].max((1, 2)), maps[rows])


def test_scores_and_maps_are_in_the_order_of_the_source():
    scored = score_split(score(MAPS), split(MASKS), N, progress="test")
    np.testing.assert_array_equal(scored.scores, MAPS.max((1, 2)))
    np.testing.assert_array_equal(scored.maps, MAPS)
    np.testing.assert_array_equal(scored.masks, MASKS)
    np.testing.assert_array_equal(scored.labels, LABELS)
    assert scored.valid is None


def test_without_masks_no_maps_are_kept():
    scored = score_split(score(MAPS), split(), N, progress="test")
    assert scored.maps is None
    figures = measure(scored)
    whole = measure(score_split(score(MAPS), split(MASKS), N, progress="test"))
    for metric, value in figures.items():
        assert value == (whole[metric] if metric.startswith("image") else None)


def test_region_overlap_is_measured_up_to_two_rates():
    figures = measure(score_split(score(MAPS), split(MASKS), N, progress="test"))
    assert figures["aupro"] == metrics.aupro(MAPS, MASKS, 0.3)
    assert figures["aupro_05"] == metrics.aupro(MAPS, MASKS, 0.05)
    assert figures["aupro_05"] < figures["aupro"]


@pytest.mark.parametrize("label", [0, 1])
def test_images_of_one_class_have_no_image_metrics(label):
    batches = [b._replace(label=np.full_like(b.label, label)) for b in split(MASKS)]
    figures = measure(score_split(score(MAPS), batches, N, progress="test"))
    for metric, value in figures.items():
        assert (value is None) == metric.startswith("image")


@pytest.mark.parametrize("defective", [False, True])
def test_masks_of_one_class_have_no_pixel_metrics(defective):
    masks = np.full_like(MASKS, defective)
    figures = measure(score_split(score(MAPS), split(masks), N, progress="test"))
    for metric, value in figures.items():
        assert (value is None) == (not metric.startswith("image"))


def test_pixel_metrics_ignore_padding():
    wide = [np.zeros((N, 10, 8), dtype) for dtype in (np.float32, bool, bool)]
    maps, masks, valid = wide
    maps[...] = 9 * RNG.normal(size=maps.shape)
    maps[:, 2:8], masks[:, 2:8], valid[:, 2:8] = MAPS, MASKS, True

    def score_valid(rows, inside):
        np.testing.assert_array_equal(inside, valid[rows])
        return MAPS[rows].max((1, 2)), maps[rows]

    padded = measure(score_split(score_valid, split(masks, valid), N, progress="test"))
    assert padded == pytest.approx(
        measure(score_split(score(MAPS), split(MASKS), N, progress="test")), abs=1e-12
    )
