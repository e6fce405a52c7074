"""Tables of the benchmarks of few images and of labelled defects."""

import pathlib
import sys

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import few_images
import labelled_defects

from fastflow_jax.evaluation import labelled


def test_rows_have_means_over_draws_and_sets_and_shares_of_false_alarms():
    entries = [
        {"detector": "knn", "folds": 16, "n": 4, "set": name, "draw": draw}
        | {"image_auroc": value, "rate": 0.2, "flagged": flagged, "others": others}
        for name, draw, value, flagged, others in [
            ("a", 0, 0.5, 1, 10),
            ("a", 1, 0.7, 3, 10),
            ("b", 0, 0.9, 0, 0),
        ]
    ]
    (row,) = few_images.table_of(entries, ["a", "b"])
    assert row["a"] == pytest.approx([0.6, 0.2 / 2**0.5], abs=1e-4)
    assert row["b"] == 0.9
    assert row["mean"] == pytest.approx(0.75)
    assert (row["draws"], row["rate"]) == ("1", 0.2)
    assert row["flagged"] == pytest.approx(0.2)  # set b has no other images
    assert (row["name"], row["n"], row["scores"]) == ("Whitened k-NN", "4", "4 folds")
    (row,) = few_images.table_of(entries[:2], ["a", "b"])
    assert "mean" not in row
    for entry in entries[1:]:
        entry["folds"] = 0
    first, second = few_images.table_of(entries, ["a", "b"])
    assert (first["scores"], second["scores"]) == ("4 folds", "held out")
    assert (first["a"], second["a"]) == (0.5, 0.7)


def test_evenly_spaced_rows_include_both_ends():
    assert few_images.evenly(np.arange(9), 3).tolist() == [0, 4, 8]
    assert few_images.evenly(np.arange(2), 5).tolist() == [0, 1]


@pytest.fixture
def scores():
    """Window scores of 30 held-out and 90 test images of two maps, and defects of two kinds."""
    rng = np.random.default_rng(0)
    defects = np.repeat(["good", "crack", "spot"], 30)
    test = rng.normal(size=(90, 2))
    test[30:, 0] += 1.0
    return {"weight": np.ones(2), "held_out": rng.normal(size=(30, 2)), "test": test}, defects


def test_a_draw_tests_the_defects_that_were_not_learned_from(scores):
    arrays, defects = scores
    found = labelled_defects.draw(arrays, defects, 5, 0, "spot")
    kept = np.flatnonzero(defects != "crack")  # good ones and the new kind
    expected = roc_auc_score(defects[kept] != "good", arrays["test"][kept].sum(1))
    assert found["before"] == pytest.approx(expected)
    drawn = np.random.default_rng((5, 0)).permutation(np.flatnonzero(defects == "crack"))[:5]
    weights = labelled.learn(arrays["held_out"], arrays["test"][drawn], np.ones(2))
    expected = roc_auc_score(defects[kept] != "good", arrays["test"][kept] @ weights)
    assert found["after"] == pytest.approx(expected)
    assert labelled_defects.draw(arrays, defects, 31, 0, "spot") is None  # there are 30


def test_a_row_counts_draws_that_use_learned_weights():
    entries = [
        {"before": 0.8, "after": 0.9, "used": True, "worse": False},
        {"before": 0.8, "after": 0.7, "used": False, "worse": True},
        {"before": 0.8, "after": 0.78, "used": True, "worse": True},
        {"before": 0.8, "after": 0.8, "used": False, "worse": False},
    ]
    row = labelled_defects.row_of(entries, "a", "new kind", 5)
    assert (row["always"], row["gated"], row["lowest"]) == pytest.approx((-0.005, 0.02, -0.02))
    assert (row["used"], row["worse"]) == ("50%", "1 of 4")
