"""Image metrics of kinds of defects, and their intervals against a plain bootstrap."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from fastflow_jax.evaluation import kinds

RNG = np.random.default_rng(0)
KINDS = np.array(["good"] * 12 + ["crack"] * 9 + ["dent"] * 5)
LABELS = KINDS != "good"
SCORES = (RNG.normal(size=26) + 0.8 * LABELS).round(1)  # with ties


def by_scikit_learn(scores, labels):
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return [roc_auc_score(labels, scores), average_precision_score(labels, scores), f1.max()]


def by_pairs(scores, labels):
    """AUROC and average precision by their definitions, which takes less time."""
    bad, good = scores[labels], scores[~labels]
    auroc = (np.sign(bad[:, None] - good).mean() + 1) / 2
    precision = [(bad >= score).sum() / (scores >= score).sum() for score in bad]
    return [auroc, np.mean(precision)]


def test_metrics_of_resamples_equal_those_of_repeated_images():
    weights = kinds.resamples(KINDS, 20, 1)
    found = kinds.image_figures(SCORES, LABELS, weights)
    for i, row in enumerate(weights):
        images = np.repeat(np.arange(26), row)
        expected = by_scikit_learn(SCORES[images], LABELS[images])
        assert [found[m][i] for m in kinds.METRICS] == pytest.approx(expected)


def test_resamples_keep_the_number_of_images_of_each_kind():
    weights = kinds.resamples(KINDS, 200, 2)
    for kind, n in (("good", 12), ("crack", 9), ("dent", 5)):
        np.testing.assert_array_equal(weights[:, kind == KINDS].sum(1), n)
    assert weights.mean(0) == pytest.approx(np.ones(26), abs=0.3)


def test_intervals_equal_those_of_a_plain_bootstrap(monkeypatch):
    found = kinds.with_intervals(SCORES, LABELS, KINDS)
    rng, drawn = np.random.default_rng(3), []
    for _ in range(1000):
        images = [rng.choice(np.flatnonzero(k == KINDS), (k == KINDS).sum()) for k in set(KINDS)]
        images = np.concatenate(images)
        drawn.append(by_pairs(SCORES[images], LABELS[images]))
    low, high = np.percentile(drawn, (2.5, 97.5), axis=0)
    assert found["image_auroc"]["interval"] == pytest.approx([low[0], high[0]], abs=0.03)
    assert found["image_ap"]["interval"] == pytest.approx([low[1], high[1]], abs=0.03)
    expected = by_scikit_learn(SCORES, LABELS)
    assert by_pairs(SCORES, LABELS) == pytest.approx(expected[:2])
    assert [found[m]["value"] for m in kinds.METRICS] == pytest.approx(expected)
    monkeypatch.setattr(kinds, "_BLOCK", 26 * 300)  # the draws of 300, 300, 300 and 100 resamples
    again = kinds.with_intervals(SCORES, LABELS, KINDS)["image_auroc"]["interval"]
    assert again == pytest.approx([low[0], high[0]], abs=0.03)


def test_each_kind_is_compared_with_all_good_images():
    rows = kinds.by_kind(SCORES, LABELS, KINDS, threshold=0.9)
    assert [(row["kind"], row["images"]) for row in rows] == [("crack", 9), ("dent", 5), (None, 14)]
    for row in rows:
        used = ~LABELS | (LABELS if row["kind"] is None else row["kind"] == KINDS)
        expected = by_scikit_learn(SCORES[used], LABELS[used])
        assert [row[m]["value"] for m in kinds.METRICS] == pytest.approx(expected)
        assert row["found"] == (SCORES[used & LABELS] > 0.9).sum()
        low, high = row["image_auroc"]["interval"]
        assert low < row["image_auroc"]["value"] <= high


def test_kinds_need_images_of_both_classes():
    assert kinds.by_kind(SCORES[:12], LABELS[:12], KINDS[:12]) == []
    assert kinds.by_kind(SCORES[12:], LABELS[12:], KINDS[12:]) == []
    (row,) = kinds.by_kind(SCORES[:21], LABELS[:21], KINDS[:21])
    assert (row["kind"], row["found"]) == ("crack", None)
