"""Guarantees of thresholds and p-values, by order statistics and by simulation."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given, settings
from scipy import stats

from fastflow_jax.decision import p_values
from fastflow_jax.errors import InputError
from fastflow_jax.evaluation import metrics
from fastflow_jax.evaluation import thresholds as T

few_values = st.floats(-9, 9).map(lambda x: round(x, 1))  # with ties
scores = st.lists(few_values, min_size=2, max_size=40).map(np.array)
rates = st.integers(1, 99).map(lambda percent: percent / 100)


@settings(deadline=None)
@given(scores, rates)
def test_p_values_of_exchangeable_scores_are_super_uniform(values, rate):
    # Each score is the new one with the same probability.
    p = [float(p_values(x, np.delete(values, i))) for i, x in enumerate(values)]
    assert np.mean(np.array(p) <= rate) <= rate + 1e-9


@settings(deadline=None)
@given(scores, few_values)
def test_p_values_count_held_out_scores(held_out, score):
    expected = (1 + sum(x >= score for x in held_out)) / (len(held_out) + 1)
    assert p_values(score, held_out) == pytest.approx(expected)


@settings(deadline=None)
@given(scores, rates, few_values)
def test_a_score_is_above_the_threshold_where_its_p_value_is_low(held_out, rate, score):
    threshold = T.image_threshold(held_out, rate, warn=False)
    p = float(p_values(score, held_out))
    if threshold.supported:
        assert (score > threshold.value) == (p <= rate + 1e-9)
    else:
        assert held_out.max() <= threshold.value <= held_out.max() + 1e-3 * np.ptp([0, *held_out])
        assert rate < 1 / (len(held_out) + 1)


@settings(deadline=None)
@given(scores, scores, rates, few_values, st.booleans())
def test_thresholds_and_p_values_of_kinds_are_the_highest(one, other, rate, score, grouped):
    held_out, kinds = np.concatenate([one, other]), np.repeat([3, 7], [len(one), len(other)])
    groups = np.arange(len(held_out)) // 2 + 100 * kinds if grouped else None
    own = [None if groups is None else groups[kinds == kind] for kind in (3, 7)]
    pairs = list(zip((one, other), own, strict=True))
    limits = [T.image_threshold(x, rate, groups=g, warn=False) for x, g in pairs]
    found = T.image_threshold(held_out, rate, groups=groups, kinds=kinds, warn=False)
    assert found.value == max(limit.value for limit in limits)
    assert found.supported == all(limit.supported for limit in limits)
    p = [float(p_values(score, x, g)) for x, g in pairs]
    assert float(p_values(score, held_out, groups, kinds)) == max(p)


def test_pixel_thresholds_of_kinds_are_the_highest():
    maps = np.random.default_rng(0).normal(size=(6, 20, 20)) + [[[0]], [[0]], [[1]]] * 2
    tails, kinds = T.tails(maps), np.array([0, 0, 1] * 2)
    found = T.pixel_threshold(tails, 0.05, kinds=kinds, warn=False)
    assert found == T.pixel_threshold(tails[kinds == 1], 0.05, warn=False)
    assert found.value > T.pixel_threshold(tails[kinds == 0], 0.05, warn=False).value + 0.5


@settings(deadline=None)
@given(scores, rates, rates)
def test_a_lower_rate_has_a_higher_threshold(held_out, one, other):
    assume(one < other)
    low, high = (T.image_threshold(held_out, r, warn=False) for r in (one, other))
    assert low.value >= high.value
    assert low.interval <= high.interval


def test_the_interval_contains_the_true_rate_as_often_as_stated():
    rng = np.random.default_rng(0)
    found = [T.image_threshold(rng.uniform(size=60), 0.1, 0.9) for _ in range(1500)]
    true = np.array([1 - t.value for t in found])  # of uniform scores
    low, high = np.transpose([t.interval for t in found])
    inside = np.mean((low <= true) & (true <= high))
    assert inside == pytest.approx(0.9, abs=0.025)
    assert true.mean() == pytest.approx(6 / 61, abs=0.004)


def test_too_few_images_for_a_rate_cause_a_warning():
    held_out = np.arange(19.0)
    T.image_threshold(held_out, 0.05)
    with pytest.warns(UserWarning, match=r"19 held-out .* rate of 0\.04 \(24 are needed\)"):
        threshold = T.image_threshold(held_out, 0.04)
    assert threshold.value == pytest.approx(18, rel=1e-3)
    assert not threshold.supported


def test_a_held_out_image_gets_the_same_decision_whatever_its_batch():
    """Scores of one image in two batches differ by about 1e-6 of their value."""
    held_out = np.random.default_rng(0).normal(50, 3, 60).astype(np.float32)
    for rate in (0.02, 0.1, 0.3):
        value = T.image_threshold(held_out, rate).value
        for noise in (-3e-6, 3e-6):
            np.testing.assert_array_equal(held_out > value, held_out * (1 + noise) > value)


def test_the_margin_is_below_the_distance_of_close_scores():
    held_out = np.arange(9.0) * 1e-9 + 1
    value = T.image_threshold(held_out, 0.2).value
    assert (held_out > value).sum() == 1


groups_of_scores = st.lists(
    st.lists(few_values, min_size=1, max_size=4), min_size=2, max_size=12
).map(lambda values: [np.array(v) for v in values])


def flat(values):
    return np.concatenate(values), np.repeat(np.arange(len(values)), [len(v) for v in values])


@settings(deadline=None)
@given(groups_of_scores, rates)
def test_p_values_of_exchangeable_groups_are_super_uniform(values, rate):
    """Each group, and each of its images, is the new one with the same probability."""
    flagged = []
    for i, new in enumerate(values):
        held_out, groups = flat(values[:i] + values[i + 1 :])
        flagged.append(np.mean(p_values(new, held_out, groups) <= rate))
    assert np.mean(flagged) <= rate + 1e-9


@settings(deadline=None)
@given(groups_of_scores, rates, few_values)
def test_the_threshold_of_groups_agrees_with_their_p_values(values, rate, score):
    held_out, groups = flat(values)
    threshold = T.image_threshold(held_out, rate, groups=groups, warn=False)
    if threshold.supported:
        assert (score > threshold.value) == (p_values(score, held_out, groups) <= rate + 1e-9)
    assert threshold.n == len(values)


def test_groups_of_copies_give_the_thresholds_of_single_images():
    rng = np.random.default_rng(0)
    held_out, tails = rng.normal(size=40), np.sort(rng.normal(size=(40, 102)), 1)[:, ::-1]
    alone = T.image_threshold(held_out, 0.1), T.pixel_threshold(tails, 0.05)
    for copies in (1, 3):
        groups = np.arange(40).repeat(copies)
        image = T.image_threshold(held_out.repeat(copies), 0.1, groups=groups)
        pixel = T.pixel_threshold(tails.repeat(copies, 0), 0.05, groups=groups)
        for one, other in zip(alone, (image, pixel), strict=True):
            assert one.value == pytest.approx(other.value)
            assert one.interval == pytest.approx(other.interval)
            assert (one.n, one.rate) == (other.n, other.rate)
        p = p_values(held_out, held_out.repeat(copies), groups)
        np.testing.assert_allclose(p, p_values(held_out, held_out))


def test_too_few_groups_for_a_rate_cause_a_warning():
    with pytest.warns(UserWarning, match="5 held-out groups cannot support"):
        T.image_threshold(np.arange(20.0), 0.1, groups=np.arange(20) // 4)


def test_the_rate_of_groups_holds_where_that_of_images_does_not():
    """Four held-out parts have eight images each, new parts have one."""
    rng = np.random.default_rng(0)
    asked, found = 0.3, {"groups": [], "images": []}
    for _ in range(800):
        held_out = (30 * rng.normal(size=(4, 1)) + rng.normal(size=(4, 8))).ravel()
        new = 30 * rng.normal(size=200) + rng.normal(size=200)
        for name, groups in (("groups", np.arange(4).repeat(8)), ("images", None)):
            threshold = T.image_threshold(held_out, asked, groups=groups)
            found[name].append(np.mean(new > threshold.value))
    assert np.mean(found["groups"]) <= asked + 0.01
    assert np.mean(found["images"]) > asked + 0.03


@pytest.mark.parametrize("rate", [0, 1, -0.1, 5])
def test_a_rate_outside_0_to_1_raises_an_error(rate):
    with pytest.raises(InputError, match="between 0 and 1"):
        T.image_threshold([1, 2], rate)
    with pytest.raises(InputError, match="between 0 and 1"):
        T.pixel_threshold(T.tails(np.ones((2, 3, 3))), rate)


def test_without_held_out_images_there_is_no_threshold():
    for function, held_out in ((T.image_threshold, []), (T.pixel_threshold, np.zeros((0, 5)))):
        with pytest.raises(InputError, match="no held-out images"):
            function(held_out, 0.1)


@settings(deadline=None)
@given(st.integers(0, 99), st.sampled_from([0.3, 0.1, 0.03, 0.01]))
def test_the_pixel_threshold_leaves_the_rate_of_held_out_pixels_above_it(seed, rate):
    rng = np.random.default_rng(seed)
    maps = rng.gamma(2.0, size=(5, 60, 50)) + rng.normal(size=(5, 1, 1))
    threshold = T.pixel_threshold(T.tails(maps), rate, warn=False)
    assert (maps > threshold.value).mean() == pytest.approx(rate, rel=0.1)
    higher = T.pixel_threshold(T.tails(maps), rate / 2, warn=False)
    assert higher.value >= threshold.value


def test_tails_ignore_padding():
    maps = np.random.default_rng(0).normal(size=(2, 40, 30))
    valid = np.zeros(maps.shape, bool)
    valid[:, 5:35] = True
    spoilt = np.where(valid, maps, 100.0)
    np.testing.assert_allclose(T.tails(spoilt, valid), T.tails(maps[:, 5:35]))


def test_the_interval_of_pixels_allows_for_variation_between_images():
    """Pixels are normal around a mean per image, so the true rate is known exactly."""
    rng = np.random.default_rng(0)
    quantiles = stats.norm.ppf(np.clip(1 - T.EXCEEDANCES, 1e-9, 1 - 1e-9))
    inside, widths = [], []
    for _ in range(150):
        tails = rng.normal(scale=0.5, size=(30, 1)) + quantiles
        threshold = T.pixel_threshold(tails, 0.05)
        true = stats.norm.sf(threshold.value / np.hypot(1, 0.5))
        inside.append(threshold.interval[0] <= true <= threshold.interval[1])
        widths.append(np.subtract(*threshold.interval[::-1]))
    assert 0.9 <= np.mean(inside) <= 0.995
    assert np.mean(widths) < 0.05


def test_too_few_images_for_a_pixel_rate_cause_a_warning():
    maps = np.random.default_rng(0).normal(size=(3, 20, 20))
    maps[2] += 3
    tails = T.tails(maps)
    with pytest.warns(UserWarning, match="cannot support a rate of 0.001"):
        T.pixel_threshold(tails, 0.001)


def test_the_f1_optimal_threshold_reaches_the_best_f1():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 50)
    values = (rng.normal(size=50) + labels).astype(np.float32)
    threshold = T.f1_optimal(values, labels)
    called = values > threshold.value
    f1 = 2 * (called & (labels == 1)).sum() / (called.sum() + labels.sum())
    assert f1 == pytest.approx(metrics.f1_max(values, labels)[0])
    assert (threshold.kind, threshold.rate, threshold.n) == ("f1", None, 50)
    with pytest.raises(InputError, match="labelled anomalies"):
        T.f1_optimal(values, np.zeros(50))


def after(x, towards=np.inf):
    """The next float32."""
    return float(np.nextafter(np.float32(x), np.float32(towards)))


@pytest.mark.parametrize(
    ("values", "labels", "expected"),
    [
        ([1, 2, 4, 8], [0, 0, 1, 1], 3.0),
        ([1, 2, 4, 8], [0, 1, 0, 1], 1.5),
        ([4, 1, 4, 2, 4], [1, 0, 0, 0, 1], 3.0),  # ties between and within the classes
        ([-np.inf, 0, np.inf], [0, 1, 1], -np.inf),
        ([0, 0, np.inf], [0, 0, 1], 0.0),
        ([1, 2, 9], [1, 0, 0], 0.99),  # no lower score: 1 % of the distance to the median
        ([7, 5], [1, 1], 4.99),
        ([2, 2, 2], [0, 1, 0], 2 - 2e-5),  # no distance
        ([1, after(1)], [0, 1], 1.0),  # no float32 in between
        ([after(1), after(after(1))], [0, 1], after(1)),
    ],
)
def test_the_f1_optimal_threshold_is_midway_to_the_next_lower_score(values, labels, expected):
    values = np.array(values, np.float32)
    threshold = T.f1_optimal(values, labels).value
    assert threshold == pytest.approx(expected, rel=1e-7)
    assert (values > threshold).tolist() == (values >= metrics.f1_max(values, labels)[1]).tolist()


@settings(deadline=None)
@given(st.data())
def test_the_f1_optimal_threshold_separates_neighbouring_float32_scores(data):
    near = st.integers(0, 5).map(lambda steps: np.float32(1) + steps * np.finfo(np.float32).eps)
    values = np.array(data.draw(st.lists(near, min_size=1, max_size=12)), np.float32)
    labels = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    assume(any(labels))
    threshold = T.f1_optimal(values, labels).value
    wanted = values >= metrics.f1_max(values, labels)[1]
    np.testing.assert_array_equal(values > threshold, wanted)  # comparison of arrays, as for masks
    assert [
        float(v) > threshold for v in values
    ] == wanted.tolist()  # comparison of floats, as for images


def test_the_f1_optimal_threshold_of_maps_is_midway():
    maps = np.array([[[1, 2], [4, 8]], [[0, 1], [2, 2]]], np.float32)
    threshold = T.f1_optimal(maps, maps > 3)
    assert (threshold.value, threshold.n) == (3.0, 2)


@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
def test_scores_that_are_equal_up_to_rounding_stay_above_the_threshold(scale):
    values = np.full(3, scale, np.float32)
    threshold = T.f1_optimal(values, [1, 1, 1]).value
    assert (values * np.float32(1 - 3e-6) > threshold).all()
    assert T.f1_optimal(np.zeros(3, np.float32), [1, 0, 1]).value < 0
