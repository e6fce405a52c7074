"""AUPIMO, sPRO, segmentation F1 and recall by size against their definitions and worked values."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from fastflow_jax.data.dataset import Regions
from fastflow_jax.errors import InputError
from fastflow_jax.evaluation import metrics, overlap


def maps_and_regions(seed, n=6, side=12, integers=False):
    """Anomaly maps, masks, and up to three rectangles, which may overlap, in every second image."""
    rng, found = np.random.default_rng(seed), []
    for i in range(n):
        masks = np.zeros((0 if i % 2 else rng.integers(1, 4), side, side), bool)
        for mask in masks:
            y, x = rng.integers(0, side - 3, 2)
            mask[y : y + rng.integers(2, 4), x : x + rng.integers(2, 4)] = True
        found.append(Regions(masks, rng.uniform(0.1, 1, len(masks)).astype(np.float32)))
    masks = np.stack([regions.masks.any(0) for regions in found])
    maps = rng.normal(0, 1, masks.shape) + masks
    return (maps.round() if integers else maps).astype(np.float32), masks, found


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
    maps, masks, _ = maps_and_regions(0, integers=integers)
    labels = np.arange(6) % 2 == 0
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


def spro_by_definition(maps, masks, regions, limit):
    """Equation 1 of the paper at each threshold, and the trapezoids up to the limit."""
    rates, overlaps = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        hit = maps >= threshold
        rates.append(hit[~masks].mean())
        each = []
        for called, found in zip(hit, regions, strict=True):
            for region, share in zip(*found, strict=True):
                each.append(min((called & region).sum() / (share * region.sum()), 1))
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
    maps, masks, regions = maps_and_regions(seed, integers=integers)
    expected = [spro_by_definition(maps, masks, regions, limit) for limit in (0.05, 0.3, 1)]
    found = overlap.au_spro(maps, masks, regions.__getitem__, (0.05, 0.3, 1))
    assert found == pytest.approx(expected, abs=1e-6)  # shares are float32
    rows = [0, 1, 3]
    part = spro_by_definition(maps[rows], masks[rows], [regions[i] for i in rows], 0.3)
    found = overlap.au_spro(maps, masks, regions.__getitem__, (0.3,), rows=rows)
    assert found == pytest.approx([part], abs=1e-6)


def test_spro_of_whole_components_is_the_region_overlap():
    maps, masks, _ = maps_and_regions(4)

    def components(i):
        numbers = metrics.regions_of(masks[i])
        each = np.arange(1, numbers.max() + 1)[:, None, None]
        return Regions(numbers == each, np.ones(len(each)))

    found = overlap.au_spro(maps, masks, components, (0.05, 0.3))
    assert found == pytest.approx(metrics.aupros(maps, masks, (0.05, 0.3)))


def test_a_found_part_of_a_region_is_enough():
    maps, masks = np.zeros((1, 10, 10), np.float32), np.zeros((1, 10, 10), bool)
    masks[0, 0, [0, 1, 8, 9]] = True  # two places where an object may be missing: one suffices
    maps[0, 0, :2] = 1
    assert overlap.au_spro(maps, masks, lambda i: Regions(masks, np.array([0.5]))) == [1.0]
    # Half of the region is above all normal pixels; the other half rises along with all of them.
    (area,) = overlap.au_spro(maps, masks, lambda i: Regions(masks, np.array([1.0])))
    assert area == pytest.approx(0.5 + 0.5 * 0.05 / 2)
    assert overlap.au_spro(maps, ~masks & masks, lambda i: None) is None


@pytest.mark.parametrize("share", [0.0, 1.5, np.nan])
def test_an_impossible_saturation_raises(share):
    maps, masks = np.zeros((1, 4, 4), np.float32), np.eye(4, dtype=bool)[None]
    with pytest.raises(InputError, match="Image 0 has regions with the saturation"):
        overlap.au_spro(maps, masks, lambda i: Regions(masks, np.array([share])))


def test_parts_of_regions_outside_the_mask_are_ignored():
    maps, masks, regions = maps_and_regions(2)
    wider = [
        Regions(np.pad(r.masks[:, :, :-1], ((0, 0), (0, 0), (1, 0))), r.saturation) for r in regions
    ]
    inside = [Regions(w.masks & m, w.saturation) for w, m in zip(wider, masks, strict=True)]
    found = overlap.au_spro(maps, masks, wider.__getitem__)
    assert found == overlap.au_spro(maps, masks, inside.__getitem__)


def test_segmentation_f1_equals_scikit_learn():
    maps, masks, _ = maps_and_regions(5)
    valid = np.ones(maps.shape, bool)
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
    assert small.interval == pytest.approx([exact.low, exact.high])
    assert (large.low, large.high, large.regions, large.found) == (0.01, 0.1, 1, 1)
    assert large.overlap == pytest.approx(0.1)
    assert large.interval == pytest.approx([0.025, 1.0])
    assert overlap.recall_by_size(maps, np.zeros_like(masks), 0.5) == []
    # All of image 0 is one region, and a part of it another; half of the image is padding.
    regions = [np.stack([masks[0], masks[0] & (np.arange(100) == 0)]), masks[1:]]
    valid = np.zeros(masks.shape, bool)
    valid[:, :50] = True
    one, other = overlap.recall_by_size(
        maps, masks, 0.5, regions=lambda i: Regions(regions[i], np.ones(1)), valid=valid
    )
    assert (one.regions, one.found, one.overlap) == (2, 1, pytest.approx(1 / 8))
    assert (other.low, other.regions) == (0.01, 1)
