"""Cross-fitted scores of taught images, with a scorer by the nearest stored vector."""

import dataclasses
import types

import numpy as np
import pytest

from fastflow_jax.detectors.base import TeachableScorer
from fastflow_jax.evaluation.teaching import Lesson, reinforce, teach


@dataclasses.dataclass(frozen=True)
class Nearest:
    """Scores an image, a vector, by its distance to the nearest stored one."""

    stored: np.ndarray  # [M, C]
    config = types.SimpleNamespace(batch_size=4)

    def score(self, features, valid=None, *, size=None):
        x = features[0][:, 0, 0]
        scores = np.linalg.norm(x[:, None] - self.stored, axis=-1).min(1)
        return scores, np.ones((len(x), 4, 4)) * scores[:, None, None]

    def state_dict(self):
        return {"stored": self.stored}

    def new_rows(self, features, valid, share):
        return {"stored": features[0][:, 0, 0]}

    def extended(self, rows):
        grown = np.concatenate([self.stored, *(each["stored"] for each in rows)])
        return dataclasses.replace(self, stored=grown)


def lesson(x, groups=None):
    return Lesson((x[:, None, None],), groups=groups)


def vectors(rng, n, shift=0.0):
    return rng.normal(shift, 1, (n, 4))


def test_other_images_of_the_kind_are_flagged_at_the_stated_rate():
    rng, rates = np.random.default_rng(0), []
    scorer = Nearest(vectors(rng, 30))
    assert isinstance(scorer, TeachableScorer)
    for _ in range(300):
        taught = teach(scorer, lesson(vectors(rng, 20, 5.0)))
        threshold = taught.held_out.image_threshold(0.1)
        scores, _ = taught.scorer.score(lesson(vectors(rng, 50, 5.0)).features)
        rates.append(np.mean(scores > threshold.value))
    assert 0.04 < np.mean(rates) < 0.105  # .1 without the four fifths, and less with all


def test_an_image_is_scored_with_the_other_fifths_stored():
    rng = np.random.default_rng(0)
    x, old = vectors(rng, 10, 5.0), vectors(rng, 30)
    taught = teach(Nearest(old), lesson(x), level=-1.0)
    distances = np.linalg.norm(x[:, None] - x, axis=-1)
    distances[np.arange(10)[:, None] // 2 == np.arange(10) // 2] = np.inf
    expected = np.minimum(distances.min(1), np.linalg.norm(x[:, None] - old, axis=-1).min(1))
    np.testing.assert_allclose(taught.held_out.scores, expected, rtol=1e-6)
    np.testing.assert_allclose(taught.held_out.tails[:, 0], expected, rtol=1e-6)
    assert sorted(taught.maps) == list(range(10))
    scores, _ = taught.scorer.score(lesson(x).features)
    np.testing.assert_allclose(scores, 0)


def test_images_of_a_part_are_in_one_fifth():
    rng = np.random.default_rng(0)
    x = np.tile(vectors(rng, 10, 5.0), (2, 1))  # each image twice
    assert (teach(Nearest(vectors(rng, 30)), lesson(x)).held_out.scores == 0).all()
    grouped = teach(Nearest(vectors(rng, 30)), lesson(x, np.tile(np.arange(10), 2)))
    assert (grouped.held_out.scores > 0).all()


@pytest.mark.parametrize(("threshold", "still"), [(0.5, 0), (-1.0, 6)])
def test_more_is_stored_of_images_that_are_still_flagged(threshold, still):
    rng = np.random.default_rng(0)
    scorer, images = Nearest(vectors(rng, 30)), lesson(vectors(rng, 6, 5.0))
    assert (scorer.score(images.features)[0] > 0.5).all()
    after, above = reinforce(scorer, images, threshold)
    assert above.sum() == still
    assert (after.score(images.features)[0] == 0).all()
