"""Scores of held-out images that are cut into tiles."""

import numpy as np
import pytest

from fastflow_jax.config import default
from fastflow_jax.data.dataset import Source
from fastflow_jax.data.tiles import Tiles
from fastflow_jax.data.tiling import Places, Tiling
from fastflow_jax.evaluation.held_out import score_held_out

N, SIZE, TILE = 10, (32, 80), (32, 32)


class Fixed:
    """A scorer whose features are the scores of tiles; maps are constant."""

    def __init__(self, config):
        self.config = config

    def score(self, features, valid=None):
        scores = features[0][:, 0, 0, 0]
        return scores, np.broadcast_to(scores[:, None, None], (len(scores), *TILE))


@pytest.fixture
def tiles():
    images = Source(
        names=tuple(map(str, range(N))),
        defects=("good",) * N,
        load=lambda index: (np.zeros((*SIZE, 3), np.uint8), None),
    )
    return Tiles.of(images, Tiling(TILE), TILE, "square")


@pytest.fixture
def scores(tiles):
    level = np.arange(len(tiles.places[0]))
    noise = np.random.default_rng(0).normal(size=(N, len(level)))
    return np.float32(10 * level + noise)  # places differ more than images


def held_out(tiles, scores, aligned):
    config = default()
    config.batch_size, config.data.aligned = 4, aligned
    features = (scores.reshape(-1, 1, 1, 1),)
    return score_held_out(config, Fixed(config), features, tiles=tiles)


def test_an_image_has_the_highest_score_of_its_tiles(tiles, scores):
    found = held_out(tiles, scores, aligned=False)
    np.testing.assert_array_equal(found.scores, scores.max(1))
    assert found.places is None


def test_aligned_tiles_are_standardised_by_those_of_the_other_images(tiles, scores):
    found = held_out(tiles, scores, aligned=True)
    expected = np.empty(N)
    for fold in range(5):
        own = np.arange(N) % 5 == fold
        others = scores[~own].astype(np.float64)
        moments = np.stack([others, others**2], -1)
        statistics = Places.fit(tiles.places[0], others, moments)
        _, _, mean, std, _, _ = statistics.table.T
        expected[own] = ((scores[own] - mean) / std).max(1)
    np.testing.assert_allclose(found.scores, expected, rtol=1e-4)


def test_new_images_are_standardised_by_all_held_out_images(tiles, scores):
    found = held_out(tiles, scores, aligned=True)
    of_all = scores.astype(np.float64)
    moments = np.stack([of_all, of_all**2], -1)
    expected = Places.fit(tiles.places[0], of_all, moments).table
    np.testing.assert_allclose(found.places, expected, rtol=1e-4, atol=1e-3)
