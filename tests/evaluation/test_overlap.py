"""AUPIMO, sPRO, segmentation F1 and recall by size against their definitions and worked values."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from fastflow_jax.errors import InputError
from fastflow_jax.evaluation import metrics, overlap


def maps_and_regions(seed, n=6, side=12, integers=False):
    """Anomaly maps, and up to three numbered rectangles in every second image."""
    rng = np.random.default_rng(seed)
    regions = np.zeros((n, side, side), np.int32)
    for image in regions[::2]:
        for number in range(1, 1 + rng.integers(1, 4)):
            y, x = rng.integers(0, side - 3, 2)
            image[y : y + rng.integers(2, 4), x : x + rng.integers(2, 4)] = number
        image[:] = np.unique(image, return_inverse=True)[1].reshape(image.shape)  # covered ones
    maps = rng.normal(0, 1, regions.shape) + (regions > 0)
    return (maps.round() if integers else maps).astype(np.float32), regions


def aupimo_by_definition(maps, masks, labels, valid, bounds):
    """Midpoint rule in the logarithm of the rate, with a threshold for each of many rates."""
    lower, upper = bounds
    thresholds = np.append(np.unique(maps), np.inf)
    normal = [(m, v) for m, v, label in zip(maps, valid, labels, strict=True) if not label]
    rates = np.array([np.mean([(m[v] >= t).mean() for m, v in normal]) for t in thresholds])
    logs = np.linspace(np.log(lower), np.log(upper), 20001)
    areas = []
    for anomaly_map, mask in zip(maps[labels == 1], masks[labels == 1], strict=True):
        recalls = np.array([(anomaly_map[mask] >= t).mean() for t in thresholds])
        # the lowest threshold whose rate is at most the given one: rates fall with the threshold
        at = [recalls[np.argmax(rates <= rate)] for rate in np.exp((logs[1:] + logs[:-1]) / 2)]
        areas.append(np.mean(at))
    return areas


@pytest.mark.parametrize("bounds", [(0.01, 0.3), (1e-5, 1e-1), (0.2, 1.0)])
@pytest.mark.parametrize("integers", [False, True])
def test_aupimo_equals_its_definition(monkeypatch, bounds, integers):
    monkeypatch.setattr(overlap, "_PENDING", 50)
    maps, regions = maps_and_regions(0, integers=integers)
    masks, labels = regions > 0, np.arange(6) % 2 == 0
    valid = np.ones(maps.shape, bool)
    valid[1, :5] = valid[3, :, 8:] = False
    found = overlap.aupimo(maps, masks, labels, valid=valid, fpr_bounds=bounds)
    expected = aupimo_by_definition(maps, masks, labels, valid, bounds)
    assert found[labels] == pytest.approx(expected, abs=2e-4)
    assert np.isnan(found[~labels]).all()


def test_aupimo_of_worked_values():
    # 1,000 normal pixels from 1 to 1000: 10 of them, 1 %, reach 991.
    maps = np.zeros((2, 25, 40), np.float32)
    maps[0] = np.arange(1, 1001).reshape(25, 40)
    masks = np.zeros(maps.shape, bool)
    masks[1, 0, :4] = True
    maps[1, 0, :4] = 1001, 991, 901, 900  # at rates 0, .01, .1 and .101
    found = overlap.aupimo(maps, masks, [0, 1], fpr_bounds=(1e-3, 1e-1))
    assert found[1] == pytest.approx((1 + 0.5 + 0 + 0) / 4)
    # Half of the defective pixels are above all normal ones, the other half below the upper bound.
    maps[1, 0, :4] = 2000, 2000, 1, 1
    assert overlap.aupimo(maps, masks, [0, 1])[1] == 0.5


def test_aupimo_without_normal_images_or_defective_pixels():
    maps, masks = np.zeros((2, 4, 4), np.float32), np.zeros((2, 4, 4), bool)
    assert overlap.aupimo(maps, masks, [1, 1]) is None
    assert np.isnan(overlap.aupimo(maps, masks, [0, 1])).all()
    with pytest.raises(InputError, match="fpr_bounds"):
        overlap.aupimo(maps, masks, [0, 1], fpr_bounds=(1e-4, 1e-5))


def spro_by_definition(maps, regions, saturation, limit):
    """Equation 1 of the paper at each threshold, and the trapezoids up to the limit."""
    rates, overlaps = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        hit = maps >= threshold
        rates.append(hit[regions == 0].mean())
        each = []
        for i, shares in enumerate(saturation):
            for k, share in enumerate(shares, 1):
                region = regions[i] == k
                each.append(min((hit[i] & region).sum() / (share * region.sum()), 1))
        overlaps.append(np.mean(each))
    rates, overlaps = np.array(rates), np.array(overlaps)
    inside = rates <= limit
    x, y = np.append(rates[inside], limit), np.append(overlaps[inside], overlaps[inside][-1])
    if not inside.all():
        (x0, x1), (y0, y1) = (v[inside.sum() - 1 :][:2] for v in (rates, overlaps))
        y[-1] = y0 + (limit - x0) * (y1 - y0) / (x1 - x0)
    return np.trapezoid(y, x) / limit


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("integers", [False, True])
def test_spro_equals_its_definition(seed, integers):
    maps, regions = maps_and_regions(seed, integers=integers)
    rng = np.random.default_rng(seed)
    saturation = [rng.uniform(0.1, 1, image.max()).tolist() for image in regions]
    expected = [spro_by_definition(maps, regions, saturation, limit) for limit in (0.05, 0.3, 1)]
    found = overlap.au_spro(maps, regions, saturation, (0.05, 0.3, 1))
    assert found == pytest.approx(expected, abs=1e-12)
    rows = [0, 1, 3]
    part = spro_by_definition(maps[rows], regions[rows], [saturation[i] for i in rows], 0.3)
    assert overlap.au_spro(maps, regions, saturation, (0.3,), rows=rows) == pytest.approx([part])


def test_spro_without_saturation_is_the_region_overlap():
    maps, regions = maps_and_regions(4)
    regions = np.stack([metrics.regions_of(image > 0) for image in regions])
    whole = [np.ones(image.max()) for image in regions]
    found = overlap.au_spro(maps, regions, whole, (0.05, 0.3))
    assert found == pytest.approx(metrics.aupros(maps, regions > 0, (0.05, 0.3)))


def test_a_found_part_of_a_region_is_enough():
    maps, regions = np.zeros((1, 10, 10), np.float32), np.zeros((1, 10, 10), int)
    regions[0, 0, [0, 1, 8, 9]] = 1  # two places where an object may be missing: one suffices
    maps[0, 0, :2] = 1
    assert overlap.au_spro(maps, regions, [[0.5]]) == [1.0]
    # Half of the region is above all normal pixels; the other half rises along with all of them.
    assert overlap.au_spro(maps, regions, [[1.0]]) == pytest.approx([0.5 + 0.5 * 0.05 / 2])


@pytest.mark.parametrize("saturation", [[[]], [[0.0]], [[1.5]], [[np.nan]]])
def test_impossible_saturation_raises(saturation):
    maps, regions = np.zeros((1, 4, 4), np.float32), np.eye(4, dtype=int)[None]
    with pytest.raises(InputError, match="Image 0 has 1 regions"):
        overlap.au_spro(maps, regions, saturation)


def test_segmentation_f1_equals_scikit_learn():
    maps, regions = maps_and_regions(5)
    masks, valid = regions > 0, np.ones(maps.shape, bool)
    valid[:, -2:] = masks[:, -2:]
    expected = f1_score(masks[valid], maps[valid] > 0.7)
    assert overlap.segmentation_f1(maps, masks, 0.7, valid=valid) == pytest.approx(expected)
    assert overlap.segmentation_f1(maps, masks, np.inf) == 0
    assert overlap.segmentation_f1(maps, np.zeros_like(masks), 0.7) is None


def test_recall_counts_regions_of_similar_size():
    maps, masks = np.zeros((2, 100, 100), np.float32), np.zeros((2, 100, 100), bool)
    masks[0, 0, 0] = masks[0, 5, 5:7] = masks[0, 20, 20] = True  # 1, 2 and 1 of 10,000 pixels
    masks[1, 10:20, 10:20] = True  # 1 %
    maps[0, 5, 5] = maps[1, 10, 10:20] = 1
    small, large = overlap.recall_by_size(maps, masks, 0.5)
    assert (small.low, small.high, small.regions, small.found) == (0.0001, 0.001, 3, 1)
    assert small.overlap == pytest.approx(1 / 6)
    exact = stats.binomtest(1, 3).proportion_ci(0.95, "exact")
    assert small.interval == pytest.approx((exact.low, exact.high))
    assert (large.low, large.high, large.regions, large.found) == (0.01, 0.1, 1, 1)
    assert large.overlap == pytest.approx(0.1)
    assert large.interval == pytest.approx((0.025, 1.0))
    assert overlap.recall_by_size(maps, np.zeros_like(masks), 0.5) == []
    # The two largest parts of image 0 are one region, and only half of the image is not padding.
    regions = (masks * 1).astype(np.int32)
    regions[0, 0, 0] = 2
    valid = np.zeros(masks.shape, bool)
    valid[:, :50] = True
    one, other = overlap.recall_by_size(maps, masks, 0.5, regions=regions, valid=valid)
    assert (one.regions, one.found, one.overlap) == (2, 1, pytest.approx(1 / 6))
    assert (other.low, other.regions) == (0.01, 1)
