"""Advice after a training on its threshold and its test set."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastflow_jax.evaluation import advice, metrics, thresholds
from fastflow_jax.features.split import split_holdout

DATA = {"trained_on": 171, "held_out": 19, "test_good": 20, "test_defective": 60}


def plain(threshold):
    return dataclasses.asdict(threshold)


def test_advice_states_the_range_of_the_false_alarm_rate_and_images_for_a_stricter_one():
    threshold = thresholds.image_threshold(np.arange(19.0), 0.05)
    text = advice.after_training(plain(threshold), DATA, None)
    assert "comes from 19 held-out images: false-alarm rate 5.0%, true rate between 0.1%" in text
    assert text.endswith("and 17.6% (95 %). A rate of 1% needs 99 held-out images.")
    many = thresholds.image_threshold(np.arange(99.0), 0.05)
    assert "needs" not in advice.after_training(plain(many), DATA | {"held_out": 99}, None)


def test_advice_counts_groups_if_images_are_grouped():
    threshold = thresholds.image_threshold(np.arange(19.0), 0.2, groups=np.arange(19) // 4)
    text = advice.after_training(plain(threshold), DATA, None)
    assert "comes from 5 held-out groups (19 images)" in text
    assert text.endswith("5% needs 19 held-out groups, so 16.7%, the lowest rate of 5, was chosen.")


@given(st.integers(20, 180))
def test_the_advised_part_supports_the_default_rate(n):
    kept, held = split_holdout(n, 0.1)
    threshold = thresholds.image_threshold(np.arange(len(held)), 1 / (len(held) + 1))
    data = {"trained_on": len(kept), "held_out": len(held)}
    text = advice.on_threshold(plain(threshold), data)
    found = re.search(r"For 5%, train with --config.data.holdout=([\d.]+)\.$", text)
    if found is None:
        assert n < 38
        assert text.endswith("was chosen.")
        return
    assert "--config" not in advice.on_threshold(plain(threshold), data | {"calibration_images": 3})
    part = float(found[1])
    assert len(split_holdout(n, part)[1]) >= 19
    assert len(split_holdout(n, part - 0.02)[1]) < 19


def test_advice_states_the_error_of_the_auroc():
    assert "image AUROC of 0.950 is known to within 0.04" in advice.after_training(None, DATA, 0.95)
    assert "no threshold" in advice.after_training(None, DATA, 0.95)


@pytest.mark.parametrize("shift", [0.5, 1.5, 2.5])
def test_the_standard_error_equals_that_of_repeated_draws(shift):
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [40, 90])
    found = [metrics.image_auroc(rng.normal(size=130) + shift * labels, labels) for _ in range(600)]
    expected = metrics.auroc_standard_error(np.mean(found), 40, 90)
    assert np.std(found) == pytest.approx(expected, rel=0.15)


def test_a_perfect_auroc_has_a_standard_error():
    assert 0.005 < metrics.auroc_standard_error(1.0, 10, 50) < 0.1
