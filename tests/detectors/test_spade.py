"""SPADE against plain numpy."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from sklearn.neighbors import NearestNeighbors

from fastflow_jax.backbones import find_spec
from fastflow_jax.config import default, fill
from fastflow_jax.detectors import spade
from fastflow_jax.detectors.maps import resize_map
from fastflow_jax.detectors.spade import METHOD, fit
from fastflow_jax.features.extract import TrainingFeatures, cached_features
from fastflow_jax.training.context import FitContext

SHAPES = ((8, 12, 5), (4, 6, 9), (2, 3, 7))


def config(**fields):
    c = default()
    c.detector, c.image_size = "spade", (32, 48)
    c.batch_size = 4
    c.spade.images = 3
    c.update_from_flattened_dict(fields)
    return fill(c)


def random_maps(n, seed=0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return tuple((3 + rng.normal(size=(n, *shape))).astype(np.float32) for shape in shapes)


def fitted(folder, maps, valid=None, **fields):
    folder.mkdir(exist_ok=True)
    return fit(FitContext(config(**fields), cached_features(maps, valid), folder))


def neighbours(known, queries, k):
    found = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(known.astype(np.float64))
    return found.kneighbors(queries.astype(np.float64))


def expected(train, test, k, kappa, levels):
    """Sections 3.2 and 3.3, with the whole gallery of each image at once."""
    distances, images = neighbours(train[-1].mean((1, 2)), test[-1].mean((1, 2)), k)
    maps = 0
    for known, query in zip(train[:levels], test[:levels], strict=True):
        pixels = k * known.shape[1] * known.shape[2]
        local = [
            neighbours(
                known[rows].reshape(-1, known.shape[-1]),
                q.reshape(-1, q.shape[-1]),
                min(kappa, pixels),
            )
            for rows, q in zip(images, query, strict=True)
        ]
        local = np.stack([d.mean(1) for d, _ in local]).reshape(query.shape[:3])
        maps += np.asarray(resize_map(local.astype(np.float32), (32, 48))) / levels
    return distances.mean(1), [gaussian_filter(m, 4 * 32 / 224) for m in maps]


@pytest.mark.parametrize("kind", ["pmap", "jit"])
@pytest.mark.parametrize(("k", "kappa"), [(3, 1), (2, 4), (50, 1), (2, 60)])
def test_scores_equal_those_of_the_paper(tmp_path, kind, k, kappa):
    train, test = random_maps(7), random_maps(3, seed=1)
    fields = {"spade.images": k, "spade.kappa": kappa, "parallel": kind}
    scores, maps = fitted(tmp_path, train, **fields).score(test)
    for one, other in zip((scores, maps), expected(train, test, min(k, 7), kappa, 2), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_transformer_map_is_both_level_and_vector(tmp_path):
    shapes = ((4, 6, 9),)
    train, test = random_maps(7, shapes=shapes), random_maps(3, seed=1, shapes=shapes)
    scores, maps = fitted(tmp_path, train).score(test)
    for one, other in zip((scores, maps), expected(train, test, 3, 1, 1), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_features_in_bfloat16_are_loaded(tmp_path):
    train, test = (
        tuple(m.astype(jnp.bfloat16) for m in maps) for maps in (random_maps(7), random_maps(3, 1))
    )
    scorer = fitted(tmp_path, train)
    loaded = METHOD.load(config(), SHAPES, METHOD.read(config(), tmp_path))
    for one, two in zip(scorer.score(test), loaded.score(test), strict=True):
        np.testing.assert_array_equal(one, two)


def test_training_images_are_normal(tmp_path):
    train = random_maps(7)
    scorer = fitted(tmp_path, train, **{"spade.images": 1})
    scores, maps = scorer.score(tuple(m[:4] for m in train))
    assert scores.max() < 1e-5
    assert maps.max() < 1e-5
    brighter, _ = scorer.score(tuple(2 * m[:4] for m in train))
    assert brighter.min() > 0.1


def test_a_loaded_scorer_gives_equal_scores(tmp_path):
    train, test = random_maps(7), random_maps(3, seed=1)
    scorer = fitted(tmp_path, train)
    again = fitted(tmp_path, random_maps(7, seed=9))  # finished: the gallery stays
    parts = TrainingFeatures(7, SHAPES, None, cached_features(train).parts, None)
    (tmp_path / "recomputed").mkdir()
    recomputed = fit(FitContext(config(), parts, tmp_path / "recomputed"))
    for other in (
        METHOD.load(config(), SHAPES, METHOD.read(config(), tmp_path)),
        again,
        recomputed,
    ):
        for one, two in zip(scorer.score(test), other.score(test), strict=True):
            np.testing.assert_array_equal(one, two)


def test_padding_is_neither_compared_nor_scored(tmp_path):
    maps, test = random_maps(8), random_maps(4, seed=1)
    valid = np.zeros((8, 32, 48), bool)
    valid[:, :16] = True
    results = []
    for i, change in enumerate((0.0, 50.0)):
        spoilt = [tuple(m.copy() for m in each) for each in (maps, test)]
        for m in (*spoilt[0], *spoilt[1]):
            m[:, m.shape[1] // 2 :] += change
        scorer = fitted(tmp_path / str(i), spoilt[0], valid)
        results.append(scorer.score(spoilt[1], valid[:4]))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    reloaded = METHOD.load(config(), SHAPES, METHOD.read(config(), tmp_path / "1"))
    for one, other in zip(results[1], reloaded.score(spoilt[1], valid[:4]), strict=True):
        np.testing.assert_array_equal(one, other)
    plain, _ = fitted(tmp_path / "plain", maps).score(spoilt[1])
    assert np.all(plain > results[0][0] + 1)


def test_levels_are_chosen_by_their_strides():
    assert spade.layers(None, find_spec("resnet18")) == ("layer1", "layer2", "layer3", "layer4")
    assert config().layers == ("blocks.1", "blocks.2", "blocks.4", "blocks.6")
    assert spade.layers(None, find_spec("deit_base_distilled_patch16_384")) == ("blocks.7",)
