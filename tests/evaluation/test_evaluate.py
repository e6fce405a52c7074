"""Scores and metrics of a split, with and without masks and padding."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from fastflow_jax.data.dataset import Regions
from fastflow_jax.evaluation import evaluate, metrics, overlap
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


def test_region_overlap_is_measured_up_to_three_rates():
    figures = measure(score_split(score(MAPS), split(MASKS), N, progress="test"))
    assert figures["aupro"] == metrics.aupro(MAPS, MASKS, 0.3)
    assert figures["aupro_10"] == metrics.aupro(MAPS, MASKS, 0.1)
    assert figures["aupro_05"] == metrics.aupro(MAPS, MASKS, 0.05)
    assert figures["aupro_05"] < figures["aupro_10"] < figures["aupro"]


def test_pixel_f1_is_the_best_one_and_segmentation_f1_that_of_a_threshold():
    figures = measure(score_split(score(MAPS), split(MASKS), N, progress="test"), threshold=0.4)
    assert figures["pixel_f1"] == pytest.approx(metrics.f1_max(MAPS, MASKS)[0])
    assert figures["seg_f1"] == pytest.approx(f1_score(MASKS.ravel(), MAPS.ravel() > 0.4))
    assert figures["seg_f1"] < figures["pixel_f1"]


def test_large_arrays_are_memory_maps_with_the_same_metrics(monkeypatch):
    in_memory = score_split(score(MAPS), split(MASKS), N, progress="test")
    monkeypatch.setattr(evaluate, "_IN_MEMORY", 100)
    on_disk = score_split(score(MAPS), split(MASKS), N, progress="test")
    assert isinstance(on_disk.maps.base, np.memmap)
    assert measure(on_disk) == measure(in_memory)


def test_evaluation_has_the_metrics_of_each_kind_and_image():
    masks = MASKS & (LABELS == 1)[:, None, None]
    scored = score_split(score(MAPS), split(masks), N, progress="test")

    def regions(i):
        return Regions(masks[i][None][: LABELS[i]], np.full(LABELS[i], 0.5))

    scored = scored._replace(regions=regions)
    defects = ["good", "dent", "crack", "good", "dent"]
    limits = evaluate.Limits(image=1.0, pixel=1.5)
    figures, details = evaluate.evaluate(scored, defects, limits)
    assert figures == measure(scored, 1.5)
    assert all(value is not None for value in figures.values())
    areas = overlap.aupimo(MAPS, masks, LABELS)
    assert [area is None for area in details.aupimo] == [label == 0 for label in LABELS]
    assert [details.aupimo[i] for i in (1, 2, 4)] == pytest.approx(areas[[1, 2, 4]].tolist())
    rows = {row["kind"]: row for row in details.kinds}
    assert rows["dent"]["aupimo"] == pytest.approx(areas[[1, 4]].mean())
    assert rows[None]["aupimo"] == figures["aupimo"] == pytest.approx(np.nanmean(areas))
    assert rows[None]["spro_05"] == pytest.approx(figures["spro_05"])
    good_and_dent = [0, 1, 3, 4]
    spro = overlap.au_spro(MAPS, masks, regions, rows=good_and_dent)
    assert rows["dent"]["spro_05"] == pytest.approx(spro[0])
    assert rows["dent"]["found"] == sum(MAPS[i].max() > 1.0 for i in (1, 4))
    assert sum(size["regions"] for size in details.sizes) == 3


def test_evaluation_without_masks_or_thresholds():
    scored = score_split(score(MAPS), split(), N, progress="test")
    _, details = evaluate.evaluate(scored, ["good", "a", "a", "good", "a"], evaluate.Limits())
    assert details.sizes == []
    assert details.aupimo is None
    assert [row["aupimo"] for row in details.kinds] == [None]


@pytest.mark.parametrize("label", [0, 1])
def test_images_of_one_class_have_no_image_metrics(label):
    batches = [b._replace(label=np.full_like(b.label, label)) for b in split(MASKS)]
    figures = measure(score_split(score(MAPS), batches, N, progress="test"))
    missing = {"image_auroc", "image_f1", "image_ap", "aupimo", "seg_f1", "spro_05"}
    assert {metric for metric, value in figures.items() if value is None} == missing


@pytest.mark.parametrize("defective", [False, True])
def test_masks_of_one_class_have_no_pixel_metrics(defective):
    masks = np.full_like(MASKS, defective)
    figures = measure(score_split(score(MAPS), split(masks), N, progress="test"))
    # AUPIMO needs normal images; these count as normal even if all of their pixels are defective.
    exempt = {"aupimo"} if defective else set()
    for metric in figures.keys() - exempt:
        assert (figures[metric] is None) == (not metric.startswith("image"))


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
