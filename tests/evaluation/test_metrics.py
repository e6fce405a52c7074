"""Metrics against worked values, scikit-learn and a direct implementation of AUPRO."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from sklearn import metrics as sklearn_metrics

from fastflow_jax.errors import InputError
from fastflow_jax.evaluation import metrics, ranking

# Few distinct values, so that ties within and between the classes are frequent.
SCORES = st.one_of(
    st.integers(-3, 3).map(float), st.floats(-1e3, 1e3, width=32, allow_subnormal=False)
)


@st.composite
def scores_and_labels(draw):
    """One to forty float32 scores with 0/1 labels."""
    count = draw(st.integers(1, 40))
    scores = draw(hnp.arrays(np.float32, count, elements=SCORES))
    return scores, draw(hnp.arrays(np.int8, count, elements=st.integers(0, 1)))


@st.composite
def maps_and_masks(draw):
    """One to three small anomaly maps with masks."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)))
    return draw(hnp.arrays(np.float32, shape, elements=SCORES)), draw(hnp.arrays(bool, shape))


def regions(mask):
    """8-connected components as lists of pixels, by flood fill."""
    left = {tuple(pixel) for pixel in np.argwhere(mask)}
    found = []
    while left:
        region, edge = [], [left.pop()]
        while edge:
            y, x = edge.pop()
            region.append((y, x))
            for neighbour in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                if neighbour in left:
                    left.remove(neighbour)
                    edge.append(neighbour)
        found.append(region)
    return found


def direct_aupro(maps, masks, fpr_limit):
    """AUPRO by its definition: one curve point per distinct threshold."""
    rates, overlaps = [0.0], [0.0]
    found = [(i, region) for i, mask in enumerate(masks) for region in regions(mask)]
    for threshold in np.unique(maps)[::-1]:
        hit = maps >= threshold
        rates.append(np.mean(hit[~masks]))
        overlaps.append(np.mean([np.mean([hit[i][pixel] for pixel in r]) for i, r in found]))
    rates, overlaps = np.array(rates), np.array(overlaps)
    inside = rates <= fpr_limit
    # If the curve is vertical at the limit, both ends give the same area.
    x = np.append(rates[inside], fpr_limit)
    y = np.append(overlaps[inside], overlaps[inside][-1])
    if not inside.all():
        (x0, x1), (y0, y1) = (v[inside.sum() - 1 :][:2] for v in (rates, overlaps))
        y[-1] = y0 + (fpr_limit - x0) * (y1 - y0) / (x1 - x0)
    return np.trapezoid(y, x) / fpr_limit


@settings(deadline=None)
@given(scores_and_labels())
def test_auroc_and_average_precision_equal_scikit_learn(drawn):
    scores, labels = drawn
    if 0 < labels.sum() < len(labels):
        auroc = sklearn_metrics.roc_auc_score(labels, scores)
        precision = sklearn_metrics.average_precision_score(labels, scores)
        assert metrics.image_auroc(scores, labels) == pytest.approx(auroc, abs=1e-12)
        assert metrics.average_precision(scores, labels) == pytest.approx(precision, abs=1e-12)
    else:
        assert metrics.image_auroc(scores, labels) is None
        assert metrics.average_precision(scores, labels) is None


@settings(deadline=None)
@given(scores_and_labels())
def test_f1_max_is_the_best_f1_at_its_lowest_threshold(drawn):
    scores, labels = drawn
    if not labels.any():
        assert metrics.f1_max(scores, labels) == (None, scores.max())
        return
    if labels.all():
        assert metrics.f1_max(scores, labels) == (None, scores.min())
        return
    all_f1 = {
        float(t): 2 * (labels & (scores >= t)).sum() / (labels.sum() + (scores >= t).sum())
        for t in np.unique(scores)
    }
    f1, threshold = metrics.f1_max(scores, labels)
    assert f1 == pytest.approx(sklearn_metrics.f1_score(labels, scores >= threshold), abs=1e-12)
    assert f1 == pytest.approx(max(all_f1.values()), abs=1e-12)
    assert threshold == min(t for t, value in all_f1.items() if value > f1 - 1e-12)


@settings(max_examples=200, deadline=None)
@given(maps_and_masks(), st.sampled_from([0.05, 0.3, 1 / 3, 0.5, 1.0]))
def test_aupro_equals_its_definition(drawn, fpr_limit):
    maps, masks = drawn
    if masks.any() and not masks.all():
        expected = direct_aupro(maps, masks, fpr_limit)
        assert metrics.aupro(maps, masks, fpr_limit) == pytest.approx(expected, abs=1e-12)
    else:
        assert metrics.aupro(maps, masks, fpr_limit) is None


@settings(max_examples=50, deadline=None)
@given(maps_and_masks())
def test_areas_up_to_several_limits_come_from_one_curve(drawn):
    maps, masks = drawn
    if masks.any() and not masks.all():
        expected = [direct_aupro(maps, masks, limit) for limit in (0.3, 0.05)]
        assert metrics.aupros(maps, masks, (0.3, 0.05)) == pytest.approx(expected, abs=1e-12)
    else:
        assert metrics.aupros(maps, masks, (0.3, 0.05)) is None


@pytest.mark.parametrize(
    ("scores", "labels", "f1", "threshold"),
    [
        ([0.1, 0.5, 0.9, 1.0], [0, 1, 1, 1], 1.0, 0.5),
        ([0.1, 0.5, 0.9, 0.1], [0, 1, 1, 1], 6 / 7, 0.1),
        ([-0.5, 0.0, 0.5, 1.0, 2.0], [0, 1, 1, 1, 1], 1.0, 0.0),
        ([-0.5, 0.0, 0.5, 1.0, -0.1], [0, 1, 1, 1, 1], 1.0, -0.1),
        ([2.3, 1.6, 2.6, 7.9, 3.3], [0, 0, 0, 1, 1], 1.0, 3.3),
        ([4.0, 3.0, 2.0, 1.0], [1, 0, 0, 0], 1.0, 4.0),
        ([4.0, 3.0, 2.0, 1.0], [1, 1, 1, 1], None, 1.0),
        ([4.0, 3.0, 2.0, 1.0], [0, 0, 0, 0], None, 4.0),
        ([], [], None, None),
    ],
)
def test_f1_max_equals_worked_values(scores, labels, f1, threshold):
    assert metrics.f1_max(scores, labels) == (pytest.approx(f1) if f1 else f1, threshold)


@pytest.mark.parametrize("columns", [[3], [1, 3, 5]])
def test_aupro_of_columns_in_a_ramp_is_half_its_limit(columns):
    # Scores rise row by row, so overlap and false-positive rate rise together.
    maps = (np.arange(2800, dtype=np.float32) / 2800).reshape(1, 400, 7)
    masks = np.zeros((1, 400, 7), bool)
    masks[..., columns] = True
    assert metrics.aupro(maps, masks, 1 / 3) == pytest.approx(1 / 6, abs=1e-3)
    both = np.zeros((1, 400, 7), bool)
    both[..., 3] = True
    together = metrics.aupro(np.concatenate([maps, maps]), np.concatenate([masks, both]), 1 / 3)
    assert together == pytest.approx(1 / 6, abs=1e-3)


def test_aupro_weights_regions_of_all_sizes_equally():
    # Regions of 1 to 5 pixels in rows 1, 3, 5, 7, 9; the score rises from row to row, so that the
    # overlap at thresholds 0, .2, .4, .6, .8, 1 is 1, .8, .6, .4, .2, 0.
    masks = np.zeros((1, 10, 5), bool)
    for i in range(5):
        masks[0, 2 * i + 1, : i + 1] = True
    maps = np.broadcast_to(0.05 + 0.1 * np.arange(10, dtype=np.float32)[:, None], (1, 10, 5))
    # Normal pixels from the top row down: 0, 5, 1, 5, 2, 5, 3, 5, 4, 5 of 35. The overlap rises by
    # a fifth in every other row, along the normal pixels tied with the region's.
    rates = np.cumsum([0, 0, 5, 1, 5, 2, 5, 3, 5, 4, 5]) / 35
    overlaps = np.array([0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]) / 5
    expected = np.trapezoid(overlaps, rates)
    assert metrics.aupro(maps, masks, 1.0) == pytest.approx(expected, abs=1e-12)


def test_pixels_that_touch_at_a_corner_are_one_region():
    masks = np.zeros((1, 4, 4), bool)
    masks[0, [0, 1, 3], [0, 1, 3]] = True  # two pixels corner to corner, and one apart
    maps = np.zeros((1, 4, 4), np.float32)
    maps[0, 3, 3] = 2  # one of two regions, above all normal pixels; the other ties with them
    limit = 0.3
    assert metrics.aupro(maps, masks, limit) == pytest.approx(0.5 + 0.5 * limit / 2)


def test_aupro_of_one_region_up_to_one_is_the_pixel_auroc():
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(2, 9, 11)).astype(np.float32)
    masks = np.zeros(maps.shape, bool)
    masks[1, 2:6, 3:9] = True
    assert metrics.aupro(maps, masks, 1.0) == pytest.approx(metrics.pixel_auroc(maps, masks))


def test_saturated_scores_tie_and_lower_the_auroc():
    m = np.array([30.0, 31.0, 40.0, 250.0], np.float32)  # mean squares of four locations
    labels = np.array([0, 0, 1, 1])
    assert metrics.image_auroc(m, labels) == 1.0
    assert metrics.image_auroc(-np.exp(-0.5 * m), labels) == 1.0
    assert metrics.image_auroc(1 - np.exp(-m), labels) == 0.5


def test_neighbouring_float32_scores_are_distinguished():
    one = np.float32(1)
    scores = np.array([one, np.nextafter(one, np.float32(2))], np.float32)
    assert metrics.image_auroc(scores, [0, 1]) == 1.0
    assert metrics.image_auroc(scores, [1, 0]) == 0.0


def test_infinities_rank_at_the_ends():
    scores = np.array([-np.inf, 0, np.inf], np.float32)
    assert metrics.image_auroc(scores, [0, 0, 1]) == 1.0
    assert metrics.f1_max(scores, [0, 0, 1]) == (1.0, np.inf)


def test_metrics_do_not_depend_on_the_number_of_samples_at_a_time(monkeypatch):
    rng = np.random.default_rng(1)
    masks = rng.random((3, 12, 12)) < 0.2
    maps = rng.integers(0, 30, masks.shape).astype(np.float32) + 20 * masks
    maps[0, 0, :2] = -np.inf, np.inf
    valid = masks | (rng.random(masks.shape) < 0.8)

    def all_figures():
        return (
            metrics.pixel_auroc(maps, masks),
            metrics.average_precision(maps, masks),
            *metrics.f1_max(maps, masks),
            metrics.aupro(maps, masks, valid=valid),
        )

    whole = all_figures()
    for name, size in (("_BLOCK", 7), ("_PART", 1), ("_RANGE", 9), ("_SAMPLE", 8)):
        monkeypatch.setattr(ranking, name, size)
        assert all_figures() == pytest.approx(whole, abs=1e-12)
    monkeypatch.setattr(ranking, "_BLOCK", 1)  # equal F1 in two blocks: the lower threshold
    assert metrics.f1_max([1.0, 2.0, 2.0, 3.0], [1, 0, 0, 1]) == (pytest.approx(2 / 3), 1.0)


def test_pixel_metrics_are_none_without_masks():
    maps = np.zeros((2, 3, 3), np.float32)
    assert metrics.pixel_auroc(maps, None) is None
    assert metrics.average_precision(maps, None) is None
    assert metrics.aupro(maps, None) is None


@pytest.mark.parametrize("figure", [metrics.image_auroc, metrics.average_precision, metrics.f1_max])
def test_invalid_input_raises_an_error_that_names_it(figure):
    with pytest.raises(InputError, match=r"scores\[1\] is NaN \(1 of 3"):
        figure([0.0, np.nan, 1.0], [0, 1, 1])
    with pytest.raises(InputError, match=r"\(3,\) and labels \(2,\)"):
        figure([0.0, 1.0, 2.0], [0, 1])
    with pytest.raises(InputError, match=r"0 \(normal\) or 1"):
        figure([0.0, 1.0], [0, 255])


def test_invalid_maps_raise_an_error_that_names_them():
    maps = np.zeros((2, 3, 3), np.float32)
    masks = np.zeros((2, 3, 3), bool)
    with pytest.raises(InputError, match="fpr_limit is 0"):
        metrics.aupro(maps, masks, 0)
    with pytest.raises(InputError, match=r"shape \(3, 3\)"):
        metrics.aupro(maps[0], masks[0])
    maps[1, 2, 0] = np.nan
    for figure in (metrics.pixel_auroc, metrics.aupro):
        with pytest.raises(InputError, match=r"scores\[1, 2, 0\] is NaN"):
            figure(maps, masks)


def test_aupro_ignores_padding():
    rng = np.random.default_rng(3)
    maps = rng.normal(size=(4, 10, 12)).astype(np.float32)
    masks = rng.random((4, 10, 12)) > 0.8
    padded = rng.normal(size=(4, 16, 12)).astype(np.float32)
    valid, wide = np.zeros(padded.shape, bool), np.zeros(padded.shape, bool)
    padded[:, 3:13], valid[:, 3:13], wide[:, 3:13] = maps, True, masks
    assert metrics.aupro(padded, wide, valid=valid) == metrics.aupro(maps, masks)
    assert metrics.aupro(padded, wide) != metrics.aupro(maps, masks)


@settings(max_examples=40, deadline=None)
@given(maps_and_masks())
def test_pixel_curves_equal_their_definition(drawn):
    maps, masks = drawn
    curves = metrics.pixel_curves(maps, masks)
    if masks.all() or not masks.any():
        assert curves is None
        return
    assert (np.diff(curves.thresholds) < 0).all()
    found = [(i, region) for i, mask in enumerate(masks) for region in regions(mask)]
    for threshold, *point in zip(*curves, strict=True):
        hit = maps >= threshold
        overlap = np.mean([np.mean([hit[i][pixel] for pixel in r]) for i, r in found])
        f1 = sklearn_metrics.f1_score(masks.ravel(), hit.ravel(), zero_division=0)
        expected = [hit[~masks].mean(), hit[masks].mean(), overlap, f1]
        np.testing.assert_allclose(point, expected, atol=1e-9)


def test_areas_under_the_pixel_curves_equal_auroc_and_aupro():
    rng = np.random.default_rng(0)
    masks = np.zeros((40, 64, 64), bool)
    for mask in masks[:20]:
        y, x = rng.integers(0, 50, 2)
        mask[y : y + 12, x : x + 8] = True
    maps = (rng.normal(0, 1, masks.shape) + 2 * masks).astype(np.float32)
    valid = np.ones(masks.shape, bool)
    valid[20:, 32:] = False
    maps[~valid] = 99
    _, x, tpr, overlap, f1 = metrics.pixel_curves(maps, masks, valid=valid)
    x, tpr, overlap = ([0, *v, 1] for v in (x, tpr, overlap))
    auroc = metrics.pixel_auroc(maps[valid], masks[valid])
    assert np.trapezoid(tpr, x) == pytest.approx(auroc, abs=1e-3)
    grid = np.linspace(0, 0.3, 3001)
    pro = np.trapezoid(np.interp(grid, x, overlap), grid) / 0.3
    assert pro == pytest.approx(metrics.aupro(maps, masks, valid=valid), abs=1e-3)
    assert max(f1) == pytest.approx(metrics.f1_max(maps[valid], masks[valid])[0], abs=2e-3)
