"""Cross-fitted scores: an image is compared with images of other parts only."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from fastflow_jax.config import default, fill
from fastflow_jax.errors import InputError
from fastflow_jax.evaluation.cross_fit import cross_fit
from fastflow_jax.features.extract import cached_features, inside

RNG = np.random.default_rng(0)
SHAPES = ((4, 4, 6), (2, 2, 8))


@pytest.fixture
def config():
    c = default()
    c.weights, c.image_size = "random", (32,)
    return fill(c)


def features_of(n, shapes=SHAPES):
    return tuple(RNG.normal(size=(n, *shape)).astype(np.float16) for shape in shapes)


def expected(features, parts, valid=None, latents=()):
    """Energies by comparing all pairs of locations of images of different parts."""
    statistics = cached_features(features, valid).statistics("whiten").values()
    vectors = [
        (m.astype(np.float64) - each["mean"]) @ each["whitening"]
        for m, each in zip(features, statistics, strict=True)
    ]
    found = []
    for y in (*vectors, *latents):
        n, h, w, c = y.shape
        of_pairs = cdist(y.reshape(-1, c), y.reshape(-1, c), "sqeuclidean") / c
        of_pairs = of_pairs.reshape(n, h * w, n, h * w)
        if valid is not None:
            of_pairs[:, :, ~np.asarray(inside(valid, (h, w))).reshape(n, h * w)] = np.inf
        of_pairs = of_pairs.min(3)
        of_pairs[np.repeat((parts[:, None] == parts)[:, None], h * w, 1)] = np.inf
        found.append(of_pairs.min(2).reshape(n, h, w))
    return found


@pytest.mark.parametrize("groups", [None, np.array([0, 0, 1, 2, 3, 3, 4])])
def test_energies_are_distances_to_the_nearest_location_of_other_parts(config, groups):
    features = features_of(7)
    parts = np.arange(7) if groups is None else groups
    found = cross_fit(config, features, groups=groups)
    for energies, reference in zip(found.maps, expected(features, parts), strict=True):
        np.testing.assert_allclose(energies, reference, atol=5e-3)


def test_latents_are_compared_as_they_are(config):
    features, latents = features_of(7), features_of(7, ((4, 4, 3), (2, 2, 5)))
    valid = np.ones((7, 32, 32), bool)
    valid[::2, 16:] = False
    found = cross_fit(config, features, valid, latents=latents)
    reference = expected(features, np.arange(7), valid, latents)
    assert len(found.maps) == len(reference) == 4
    for energies, each in zip(found.maps, reference, strict=True):
        seen = np.asarray(inside(valid, each.shape[1:]))
        np.testing.assert_allclose(energies[seen], each[seen], atol=5e-3)


def test_latents_reveal_an_image_whose_features_are_usual(config):
    features, latents = features_of(12), features_of(12)
    latents[0][4, 1:3, 1:3] += 8
    assert cross_fit(config, features, latents=latents).scores.argmax() == 4
    assert cross_fit(config, features, latents=features).scores.argmax() != 4


def test_an_odd_image_has_the_highest_score_and_map(config):
    features = features_of(12)
    for m in features:
        m[5, 1:, :2] += 6
    found = cross_fit(config, features)
    assert found.scores.argmax() == 5
    assert found.scores[5] > 4
    assert np.median(found.scores) == pytest.approx(0, abs=1e-6)
    maps = found.anomaly_maps(np.array([5, 2]))
    assert maps.shape == (2, 32, 32)
    assert maps[0, 16:, :16].mean() > maps[0, :16, 16:].mean() + 0.5
    assert maps[0].max() > maps[1].max()


def test_an_image_that_differs_as_a_whole_scores_high(config):
    features = features_of(40)
    for m in features:
        m[7] += 0.6  # no location stands out
    scores = cross_fit(config, features).scores
    assert (scores > scores[7]).sum() <= 1


def test_copies_hide_each_other_unless_they_are_a_group(config):
    features = features_of(12)
    for m in features:
        m[3, :2] += 6
        m[4] = m[3]
    groups = np.arange(12)
    groups[4] = 3
    hidden = cross_fit(config, features).scores
    shown = cross_fit(config, features, groups=groups).scores
    assert hidden[3:5].max() < np.delete(hidden, [3, 4]).max()
    assert shown[3:5].min() > np.delete(shown, [3, 4]).max()


def test_padding_has_no_effect(config):
    features, valid = features_of(8, ((4, 4, 6),)), np.ones((8, 32, 32), bool)
    valid[::2, 16:] = False
    changed = tuple(m.copy() for m in features)
    changed[0][:, 2:][~valid[:, 16::8, ::8]] = 50
    found, others = (cross_fit(config, f, valid) for f in (features, changed))
    np.testing.assert_array_equal(found.maps[0], others.maps[0])
    np.testing.assert_array_equal(found.scores, others.scores)
    seen = np.asarray(inside(valid, (4, 4)))
    (reference,) = expected(features, np.arange(8), valid)
    np.testing.assert_allclose(found.maps[0][seen], reference[seen], atol=5e-3)
    mean = np.broadcast_to(reference.mean((1, 2), where=seen, keepdims=True), seen.shape)
    np.testing.assert_allclose(found.maps[0][~seen], mean[~seen], atol=5e-3)


def test_fine_maps_are_thinned_out(config):
    features = features_of(5, ((32, 48, 3),))
    assert cross_fit(config, features).maps[0].shape == (5, 16, 24)


def test_few_similar_images_give_higher_energies(config):
    features = features_of(9)
    all_, one = (cross_fit(config, features, similar=n).maps[0] for n in (8, 1))
    assert (one > all_ - 1e-3).all()
    assert one.mean() > all_.mean()


def test_equal_images_have_the_score_0(config):
    features = tuple(np.repeat(m, 6, axis=0) for m in features_of(1))
    np.testing.assert_allclose(cross_fit(config, features).scores, 0, atol=1e-6)


@pytest.mark.parametrize(
    ("n", "groups", "message"),
    [
        (4, None, r"4 normal images are too few .* at least 5 images"),
        (8, np.arange(8) // 2, r"4 normal groups of images are too few .* at least 5 groups"),
    ],
)
def test_too_few_images_are_refused(config, n, groups, message):
    with pytest.raises(InputError, match=message):
        cross_fit(config, features_of(n), groups=groups)
