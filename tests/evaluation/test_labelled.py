"""Weights of maps that are learned from labelled defects."""

import logging

import numpy as np
import pytest
from PIL import Image
from scipy import optimize

from fastflow_jax import Detector
from fastflow_jax.config import default
from fastflow_jax.detectors.base import recipe
from fastflow_jax.errors import InputError
from fastflow_jax.evaluation import labelled

RNG = np.random.default_rng(0)


def scores(n, shift, maps=4):
    """Window scores [n, maps] of unit variance; the first map is shifted."""
    found = RNG.normal(size=(n, maps))
    found[:, 0] += shift
    return found


def test_weights_minimise_the_loss_of_all_pairs():
    normal, defective = scores(12, 0, 3), scores(8, 2.0, 3) + 2.0
    pairs = [(d - n) / np.std(normal.mean(1)) for d in defective for n in normal]

    def loss(w):
        of_pairs = [np.log1p(np.exp(-pair @ w)) for pair in pairs]
        return np.mean(of_pairs) + 0.003 * np.sum((3 * w - 1) ** 2)

    found = optimize.minimize(loss, np.ones(3) / 3, method="Nelder-Mead").x
    assert found.min() > 0  # so that the bounds have no effect
    weights = labelled.learn(normal, defective, np.ones(3))
    np.testing.assert_allclose(weights, 3 * found / found.sum(), rtol=1e-2)


def test_weights_are_not_negative_and_unused_maps_stay_unused():
    normal, defective = scores(30, 0), scores(20, 2.0)
    defective[:, 1] -= 3.0
    w = labelled.learn(normal, defective, np.array([1.0, 1.0, 0.0, 2.0]))
    assert w[1] == w[2] == 0
    assert w.sum() == pytest.approx(4)


def test_a_map_that_tells_defects_apart_is_a_gain_and_noise_is_none():
    found = labelled.gain(scores(60, 0, 8), scores(40, 2.0, 8), np.ones(8))
    assert found.is_positive
    assert 0 < found.interval[0] < found.mean < found.interval[1]
    equal = labelled.gain(scores(60, 0), scores(40, 0), np.ones(4))
    assert not equal.is_positive


def test_noise_is_rarely_taken_for_a_gain():
    """The lower end of a 95 % interval is above 0 in one of 40 draws; learned weights overfit."""
    found = [
        labelled.gain(scores(30, 0), scores(10, 0) + 1.0, np.ones(4), i).is_positive
        for i in range(10)
    ]
    assert sum(found) <= 1


def images(n, seed=0):
    return np.random.default_rng(seed).integers(118, 138, (n, 20, 30, 3), np.uint8)


def spoilt(n, seed=9):
    found = images(n, seed)
    found[:, 6:16, 12:24] = (250, 20, 20)
    return found


def config(kind="knn", **fields):
    c = default()
    c.update(recipe(kind))
    c.backbone, c.image_size, c.data.holdout = "pixels", (16,), 0.25
    c.update_from_flattened_dict(fields)
    return c


@pytest.mark.parametrize("folds", [0, 8])
def test_a_detector_is_unchanged_if_defects_do_not_help(folds, caplog, tmp_path):
    caplog.set_level(logging.INFO, "fastflow_jax")
    how = {"data.folds": folds, "data.holdout": 0.0 if folds else 0.25}
    plain = Detector.fit(images(24), config=config(**how))
    detector = Detector.fit(
        images(24), config=config(**how), defects=spoilt(6), workdir=tmp_path / "run"
    )
    assert "6 labelled defects: learned weights change" in caplog.text
    assert "They are not used." in caplog.text
    assert detector.predict(spoilt(1, 3)[0]).score == plain.predict(spoilt(1, 3)[0]).score
    np.testing.assert_array_equal(detector.held_out.scores, plain.held_out.scores)
    with pytest.raises(InputError, match="not those that"):
        Detector.fit(images(24), config=config(**how), workdir=tmp_path / "run")


@pytest.mark.parametrize("folds", [0, 8])
def test_learned_weights_are_saved_and_held_out_images_are_scored_without_them(
    folds, monkeypatch, tmp_path
):
    """The backbone of pixels has one map, whose weight is doubled in place of a learned one."""
    monkeypatch.setattr(labelled.Gain, "is_positive", True)
    learned_from = []

    def learn(normal, defective, weights):
        assert weights == pytest.approx([1.0])
        learned_from.append(len(normal))
        return 2 * weights

    monkeypatch.setattr(labelled, "learn", learn)
    how = {"data.folds": folds, "data.holdout": 0.0 if folds else 0.25}
    detector = Detector.fit(images(24), config=config(**how), defects=spoilt(6))
    assert detector.scorer.calibration.weight == pytest.approx([2.0])
    n = 24 if folds else 6
    assert learned_from[-6] == n  # for the detector
    assert all(m < n for m in learned_from[-5:])  # for the scores of each fifth


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("patchcore", {}, "patchcore cannot learn from defects"),
        ("fastflow", {"score.form": "top_k"}, "config.score.form is 'top_k'"),
        ("knn", {"data.holdout": 0.0}, "needs held-out normal images"),
    ],
)
def test_a_detector_that_cannot_learn_refuses(kind, fields, message):
    with pytest.raises(InputError, match=message):
        Detector.fit(images(24), config=config(kind, **fields), defects=spoilt(6))


def test_too_few_defects_are_refused():
    with pytest.raises(InputError, match="2 defects and 6 held-out normal images are too few"):
        Detector.fit(images(24), config=config(), defects=spoilt(2))


@pytest.mark.parametrize("i", [0, 3])
def test_a_defect_that_is_also_a_normal_image_is_named(i):
    normal = images(24)
    defects = [*spoilt(5), normal[i]]
    with pytest.raises(InputError, match=r"image 5, .* is a defect, but equals the normal image"):
        Detector.fit(normal, config=config(), defects=defects)


def test_defects_of_another_size_are_resized_and_an_empty_directory_is_named(tmp_path):
    large = np.stack([np.kron(x, np.ones((2, 2, 1), np.uint8)) for x in spoilt(5)])
    Detector.fit(images(24), config=config(), defects=large)
    with pytest.raises(InputError, match="no images"):
        Detector.fit(images(24), config=config(), defects=tmp_path)
    for i, image in enumerate(spoilt(5)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    Detector.fit(images(24), config=config(), defects=tmp_path)
