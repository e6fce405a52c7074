"""Teaching new normal images: `Detector.update`, versions of a run, and `--mode=update`."""

import dataclasses
import json
import logging
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from fastflow_jax import Detector
from fastflow_jax.config import default
from fastflow_jax.detectors.base import DETECTORS, recipe
from fastflow_jax.errors import InputError

TEACHABLE = ("fastflow", "knn", "patchcore", "spade")


def tiny(kind, **fields):
    """A configuration that trains in seconds, on pixels."""
    c = default()
    c.update(recipe(kind))
    c.backbone, c.image_size, c.batch_size = "pixels", (16,), 8
    c.data.holdout = 0.5
    if kind == "fastflow":
        fields = {"flow.steps": 1, "flow.hidden_ratio": 1.0, "map.bank": 400, **fields}
        fields |= {"train.epochs": 1, "train.batch_size": 8}
    if kind in ("cflow", "vae", "gan"):
        own = {"cflow": "steps", "vae": "width", "gan": "width"}[kind]
        fields = {f"{kind}.{own}": 4, "train.epochs": 1, "train.batch_size": 8, **fields}
    c.update_from_flattened_dict(fields)
    return c


def photographs(n, seed=0, light=0):
    """Evenly grey, with a little noise, uint8 [n, 20, 20, 3]; `light` makes them brighter."""
    return np.random.default_rng(seed).integers(118 + light, 138 + light, (n, 20, 20, 3), np.uint8)


def spoilt(seed=9, light=0):
    image = photographs(1, seed, light)[0]
    image[6:14, 6:14] = (250, 20, 20)
    return image


def flagged(detector, images):
    return np.mean([result.is_anomalous for result in detector.stream(images)])


@pytest.fixture(scope="module")
def fitted():
    """A function that fits a detector once."""
    known = {}

    def of(kind):
        if kind not in known:
            known[kind] = Detector.fit(photographs(60), config=tiny(kind))
        return known[kind]

    return of


@pytest.mark.parametrize("kind", TEACHABLE)
def test_taught_images_and_others_of_their_kind_are_normal(kind, fitted, tmp_path):
    before = fitted(kind)
    brighter, others = photographs(40, 1, light=40), photographs(60, 2, light=40)
    old = photographs(60, 3)
    assert flagged(before, others) == flagged(before, brighter) == 1
    after = before.update(brighter)
    assert flagged(after, brighter) == 0
    assert flagged(after, others) <= 0.15  # stated: .05, of 60 images
    assert flagged(after, old) <= flagged(before, old) <= 0.15
    assert flagged(after, [spoilt(), spoilt(8, light=40)]) == 1
    for one, other in zip(before.stream(old), after.stream(old), strict=True):
        assert other.score <= one.score + 1e-5 * max(1, abs(one.score))
        assert other.p_value >= one.p_value
    assert after.image_threshold.rate == before.image_threshold.rate == 0.05
    results = after.predict([*others[:4], spoilt()])
    again = Detector.load(after.save(tmp_path / "saved.zip")).predict([*others[:4], spoilt()])
    for one, other in zip(results, again, strict=True):
        assert (one.p_value, one.is_anomalous) == (other.p_value, other.is_anomalous)
        assert one.score == pytest.approx(other.score, rel=1e-4)


def test_a_taught_image_that_was_flagged_is_normal(fitted):
    before, image = fitted("knn"), spoilt()
    assert flagged(before, [image]) == 1
    after = before.update(image)
    assert flagged(after, [image]) == 0
    assert after.image_threshold == before.image_threshold
    assert after.held_out is before.held_out
    blue = image.copy()
    blue[6:14, 6:14] = (20, 20, 250)
    assert flagged(after, [blue]) == 1
