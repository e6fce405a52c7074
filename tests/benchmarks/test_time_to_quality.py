"""The time at which an AUROC is reached and kept."""

import pathlib
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
from time_to_quality import compare, peer_seconds, reached_and_kept


@pytest.mark.parametrize(
    ("aurocs", "seconds"),
    [
        ((0.5, 0.8, 0.9), 2),
        ((0.9, 0.6, 0.8), 3),  # falls below the mark again
        ((0.8, 0.9, 0.6), None),  # below the mark at the end
        ((0.7, 0.7, 0.7), 1),  # the mark itself counts
        ((0.5,), None),
        ((), None),
    ],
)
def test_reached_and_kept(aurocs, seconds):
    assert reached_and_kept(list(enumerate(aurocs, 1)), 0.7) == seconds


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_every_curve_reaches_and_keeps_its_last_value(aurocs):
    curve = list(enumerate(aurocs))
    since = reached_and_kept(curve, aurocs[-1])
    assert all(auroc >= aurocs[-1] for _, auroc in curve[since:])
    assert since == 0 or aurocs[since - 1] < aurocs[-1]


TIMED = {
    "data": {"train": 48},
    "recipe": {"batch": 32},
    "decode_seconds": 1.0,
    "train_feature_seconds": 4.0,
    "plain_step_median_seconds": 2.0,
    "cached_step_median_seconds": 1.0,
}


def test_seconds_of_the_peer_are_its_steps_and_its_preparation():
    assert peer_seconds(TIMED, 10, "plain") == 1 + 15 * 2
    assert peer_seconds(TIMED, 10, "cached_features") == 1 + 4 + 15 * 1


def test_ratios_are_the_peers_seconds_over_ours():
    peer = {
        "curve": [
            {"epoch": epoch, "image_auroc": auroc}
            for epoch, auroc in ((2, 0.6), (4, 0.9), (6, 0.7), (8, 0.8))
        ]
    }
    ours = [[(2.0, 0.7), (3.0, 0.85), (5.0, 0.95)]]
    found = compare(ours, peer, [TIMED], "plain")
    assert found == {
        "time_to_quality": (1 + 24) / 3,  # .8 from epoch 8 on: above at 4, below at 6
        "time_to_best": (1 + 12) / 5,
        "whole_training": (1 + 24) / 5,
    }
    assert "time_to_best" not in compare([[(5.0, 0.85)]], peer, [TIMED], "plain")
