"""Teaching: new normal images extend the memory banks of a trained scorer, without training.

Scores of new images of the same kind must be compared with scores of images that the scorer does
not store. So the images are cross-fitted: each fifth of them is scored by a scorer that stores rows
of the other four fifths. The final scorer stores the rows of all fifths, and more rows only lower a
score. Hence, for a new image of the kind, every one of these scorers gives at least its final
score, and the p-values of cross-conformal prediction (Vovk, Annals of Mathematics and Artificial
Intelligence 74, 2015) hold for the final scorer too: on exchangeable images, the share of p-values
up to a is at most 2 a + O(1 / n) in the worst case, and in practice about a or less. For the same
reason the scores of earlier held-out images remain upper bounds, and earlier statements hold.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from fastflow_jax.decision import rounded_down
from fastflow_jax.detectors.base import TeachableScorer
from fastflow_jax.evaluation import thresholds
from fastflow_jax.evaluation.held_out import HeldOut
from fastflow_jax.features.extract import Features

_FOLDS = 5
_SHARE = 1 / 4  # rows that images add to a bank at most, over its size in training
_ROUNDS, _MORE = 4, 1 / 16  # further rows for images that would still be flagged


@dataclasses.dataclass(frozen=True, eq=False)
class Lesson:
    """Features of new normal images."""

    features: Features  # [n, h, w, C] per scale
    valid: np.ndarray | None = None  # bool [n, H, W], False in padding; None without padding
    groups: np.ndarray | None = None  # int [n], equal for images of one part; None if all differ

    def __len__(self) -> int:
        return len(self.features[0])

    def __getitem__(self, rows: np.ndarray) -> "Lesson":
        return Lesson(
            tuple(scale[rows] for scale in self.features),
            None if self.valid is None else self.valid[rows],
            None if self.groups is None else self.groups[rows],
        )

    @property
    def parts(self) -> np.ndarray:
        """Number of the part of each image, from 0 on in the order of the images, int [n]."""
        if self.groups is None:
            return np.arange(len(self))
        _, first, part = np.unique(self.groups, return_index=True, return_inverse=True)
        return np.argsort(np.argsort(first))[part]


@dataclasses.dataclass(frozen=True, eq=False)
class Taught:
    """A scorer that stores new images, and how these were scored before it stored them."""

    scorer: TeachableScorer
    held_out: HeldOut  # of the images, cross-fitted
    maps: Mapping[int, np.ndarray]  # cross-fitted anomaly maps of those above the level


def teach(scorer: TeachableScorer, lesson: Lesson, level: float = np.inf) -> Taught:
    """Extends a scorer by new normal images, and scores these by cross-fitting.

    Folds are stretches of the order of the images, because neighbours may be alike, and images of
    one part are in the same fold.

    Args:
      scorer: a trained scorer.
      lesson: the images.
      level: image score above which anomaly maps are returned.

    Raises:
      InputError: see `TeachableScorer`.
    """
    parts = lesson.parts
    n_parts = parts.max() + 1
    folds = min(_FOLDS, n_parts)
    fold = parts * folds // n_parts
    rows = [
        scorer.new_rows(part.features, part.valid, _SHARE / folds)
        for part in (lesson[fold == i] for i in range(folds))
    ]
    scores, maps = np.empty(len(lesson), np.float32), {}
    tails = np.empty((len(lesson), len(thresholds.EXCEEDANCES)))
    for i in range(folds):
        others = scorer.extended([*rows[:i], *rows[i + 1 :]])
        own = np.flatnonzero(fold == i)
        for batch, found, found_maps in _scored(others, lesson[own]):
            batch = own[batch]
            scores[batch] = found
            valid = None if lesson.valid is None else lesson.valid[batch]
            tails[batch] = thresholds.tails(found_maps, valid)
            maps |= {j: m for j, m in zip(batch, found_maps, strict=True) if scores[j] > level}
    return Taught(scorer.extended(rows), HeldOut(scores, tails, lesson.groups), maps)


def reinforce(
    scorer: TeachableScorer, lesson: Lesson, threshold: float
) -> tuple[TeachableScorer, np.ndarray]:
    """Stores more of taught images that are still above the threshold.

    Returns:
      The scorer, and bool [n], whether an image is above the threshold nevertheless.
    """
    above = np.zeros(len(lesson), bool)
    for left in reversed(range(_ROUNDS + 1)):
        for rows, scores, _ in _scored(scorer, lesson):
            above[rows] = scores > rounded_down(threshold)
        if not above.any() or not left:
            break
        some = lesson[above]
        scorer = scorer.extended([scorer.new_rows(some.features, some.valid, _MORE)])
    return scorer, above


def _scored(
    scorer: TeachableScorer, lesson: Lesson
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields the rows, scores and anomaly maps of each batch."""
    size = scorer.config.batch_size
    for first in range(0, len(lesson), size):
        rows = np.arange(first, min(first + size, len(lesson)))
        batch = lesson[rows]
        yield rows, *scorer.score(batch.features, batch.valid)
