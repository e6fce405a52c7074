"""Samples ranked by score, in bounded memory, and the metrics that follow from their ranks.

Let TP(s) and FP(s) be the numbers of defective and normal samples with a score of at least s, and
P and N the numbers of all defective and normal samples. Each metric is a sum or a maximum over the
defective samples. A defective sample with score s contributes

    AUROC   the share of normal samples with a score below s; equal scores count half
    AP      the precision at s, TP(s) / (TP(s) + FP(s))
    F1      2 TP(s) / (TP(s) + FP(s) + P)
    AUPRO   the area to the right of its step in the curve of region overlap over FP / N

Thresholds are not binned, and ties are exact. Memory is needed for `_RANGE` defective and `_PART`
normal samples at a time: more defective samples are ranked in several passes, each over a range of
scores. Maps and masks may be memory maps; they are read image by image.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastflow_jax.errors import InputError

_RANGE = 1 << 25  # defective samples that are ranked at a time
_PART = 1 << 25  # normal samples that are sorted at a time
_BLOCK = 1 << 20  # defective samples whose contributions are computed at a time
_SAMPLE = 1 << 16  # defective samples that the ranges are chosen from

# Weights [p] of the defective samples of an image, given its index, in the order of
# `scores[i][labels[i]]`. Those of one region sum to 1.
Weigh = Callable[[int], np.ndarray]


class Ranked(NamedTuple):
    """K defective samples with scores s in a range, ascending, and the counts at each."""

    scores: np.ndarray  # [K]
    true: np.ndarray  # int64 [K], TP(s)
    false: np.ndarray  # int64 [K], FP(s)
    above: np.ndarray  # int64 [K], normal samples with a score above s
    weights: Mapping[str, np.ndarray]  # float64 [K] by name


class Figures(NamedTuple):
    """Metrics of ranked samples."""

    auroc: float
    average_precision: float
    f1: float
    threshold: float  # the lowest one with the highest F1
    areas: Mapping[str, list[float]]  # by the name of the weights, one for each limit


def check(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores as floating-point numbers and labels as bool, of one shape.

    Raises:
      InputError: a score is NaN, a label is neither 0 nor 1, or the shapes differ.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.dtype.kind != "f":
        scores = scores.astype(np.float64 if scores.dtype.kind in "iub" else np.float32)
    if scores.shape != labels.shape:
        raise InputError(
            f"Scores have shape {scores.shape} and labels {labels.shape}. The shapes must be equal."
        )
    if scores.size and np.isnan(scores.min()):
        where = np.argwhere(np.isnan(scores))
        first = ", ".join(str(i) for i in where[0])
        raise InputError(
            f"scores[{first}] is NaN ({len(where)} of {scores.size} scores are). The training has "
            "diverged: train again with a lower learning rate."
        )
    if labels.dtype != bool:
        if not np.isin(labels, (0, 1)).all():
            raise InputError("Labels and masks must be 0 (normal) or 1 (defective).")
        labels = labels.astype(bool)
    return scores, labels


def figures(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    valid: np.ndarray | None = None,
    weights: Mapping[str, Weigh] | None = None,
    fpr_limits: Sequence[float] = (),
    rows: Sequence[int] | np.ndarray | None = None,
) -> Figures | None:
    """Computes all metrics of samples from one ranking; see the module.

    Args:
      scores: image scores [B] or anomaly maps [B, H, W].
      labels: same shape, 1 or True for defective.
      valid: bool, same shape, False in padded pixels, none of which is defective, or None if there
        is no padding.
      weights: of the defective pixels in region overlap, by name.
      fpr_limits: areas under the overlap are computed up to these false-positive rates and divided
        by them, each above 0 and at most 1.
      rows: indices of the images that count; None: all.

    Returns:
      The metrics; None with samples of one class.

    Raises:
      InputError: see `check`, or a limit is not possible.
    """
    for limit in fpr_limits:
        if not 0 < limit <= 1:
            raise InputError(f"fpr_limit is {limit}. It must be above 0 and at most 1.")
    scores, labels = check(scores, labels)
    images = _Images(scores, labels, valid, rows)
    n_defective, n_normal = images.n_defective, images.n_normal
    if not n_defective or not n_normal:
        return None
    weights, precision, not_below = weights or {}, 0.0, 0
    best, threshold = -1.0, np.nan
    areas = {name: np.zeros(len(fpr_limits)) for name in weights}
    totals = dict.fromkeys(weights, 0.0)
    for ranked in _blocks(_rank(images, weights)):
        found = ranked.true + ranked.false
        not_below += int((ranked.false + ranked.above).sum())
        precision += float((ranked.true / found).sum())
        f1 = 2 * ranked.true / (found + n_defective)
        i = int(np.argmax(f1))  # the first, and so the lowest, because blocks ascend
        if f1[i] > best:
            best, threshold = float(f1[i]), float(ranked.scores[i])
        for name, each in ranked.weights.items():
            totals[name] += each.sum()
            areas[name] += [_area(ranked, each, n_normal, limit) for limit in fpr_limits]
    pairs = 2 * n_defective * n_normal
    return Figures(
        (pairs - not_below) / pairs,
        precision / n_defective,
        best,
        threshold,
        {name: [float(a / totals[name]) for a in each] for name, each in areas.items()},
    )


def _area(ranked: Ranked, weights: np.ndarray, n_normal: int, limit: float) -> float:
    """Area under the overlap of the weighted samples up to a false-positive rate, divided by it."""
    # The overlap rises from the rate of normal pixels above the sample to the rate that includes
    # those equal to it: a ramp with ties, a jump without.
    start, end = ranked.above / n_normal, ranked.false / n_normal
    ramp = np.minimum(end, limit) - start
    height = np.divide(ramp, end - start, out=np.ones_like(ramp), where=end > start)
    steps = height * ramp / 2 + np.maximum(limit - end, 0)
    return float(np.dot(weights, np.where(start < limit, steps, 0))) / limit


def _blocks(ranges: Iterable[Ranked]) -> Iterator[Ranked]:
    """Splits ranked samples into blocks of at most `_BLOCK`."""
    for ranked in ranges:
        for start in range(0, len(ranked.scores), _BLOCK):
            block = slice(start, start + _BLOCK)
            counts = (ranked.scores, ranked.true, ranked.false, ranked.above)
            scores, true, false, above = (each[block] for each in counts)
            parts = {name: each[block] for name, each in ranked.weights.items()}
            yield Ranked(scores, true, false, above, parts)


class _Images:
    """Scores of defective and of normal samples, image by image."""

    def __init__(self, scores: np.ndarray, labels: np.ndarray, valid: np.ndarray | None, rows=None):
        flat = (1, -1) if scores.ndim == 1 else scores.shape
        self.scores, self.labels = scores.reshape(flat), labels.reshape(flat)
        self.valid = None if valid is None else valid.reshape(flat)
        every = range(len(self.scores))
        self.rows: list[int] = [*every] if rows is None else np.asarray(rows).tolist()
        self.n_defective = sum(int(self.labels[i].sum()) for i in self.rows)
        self.n_normal = sum(int(self._normal(i).sum()) for i in self.rows)

    def defective(self, i: int) -> np.ndarray:
        return self._read(i, self.labels[i])

    def normal(self, i: int) -> np.ndarray:
        return self._read(i, self._normal(i))

    def _normal(self, i: int) -> np.ndarray:
        normal = ~self.labels[i]
        return normal if self.valid is None else normal & self.valid[i]

    def _read(self, i: int, where: np.ndarray) -> np.ndarray:
        values = self.scores[i][where]
        return values.astype(np.float32) if values.dtype == np.float16 else values


def _rank(images: _Images, weights: Mapping[str, Weigh]) -> Iterator[Ranked]:
    """Yields the defective samples in ranges of ascending scores, see `figures`."""
    edges = _edges(images)
    # Samples above each range, counted while the range below is read; the lowest range is first.
    for low, high in zip([-np.inf, *edges], [*edges, None], strict=True):
        values, higher, parts = [], 0, {name: [] for name in weights}
        for i in images.rows:
            scored = images.defective(i)
            inside, above = _within(scored, low, high)
            higher += above
            values.append(scored[inside])
            for name, weigh in weights.items():
                if inside.any():
                    parts[name].append(weigh(i)[inside])
        defective = np.concatenate(values)
        order = np.argsort(defective)
        defective = defective[order]
        weighted = {name: np.concatenate(each)[order] for name, each in parts.items()}
        false = np.zeros(len(defective), np.int64)
        strictly_above = np.zeros(len(defective), np.int64)
        for part, beyond in _normal_parts(images, low, high):
            false += beyond + len(part) - np.searchsorted(part, defective, "left")
            strictly_above += beyond + len(part) - np.searchsorted(part, defective, "right")
        true = higher + len(defective) - np.searchsorted(defective, defective, "left")
        yield Ranked(defective, true, false, strictly_above, weighted)


def _edges(images: _Images) -> np.ndarray:
    """Scores that divide the defective samples into ranges of about `_RANGE`, ascending."""
    total = images.n_defective
    if total <= _RANGE:
        return np.empty(0)
    every = max(1, total // _SAMPLE)
    some = np.concatenate([images.defective(i)[::every] for i in images.rows])
    n = -(-total // _RANGE)
    return np.unique(np.quantile(some, np.arange(1, n) / n, method="nearest"))


def _within(values: np.ndarray, low: float, high: float | None) -> tuple[np.ndarray, int]:
    """Which values are at least `low` and below `high`, and the number of those above."""
    inside = values >= low
    if high is None:
        return inside, 0
    above = values >= high
    return inside & ~above, int(above.sum())


def _normal_parts(
    images: _Images, low: float, high: float | None
) -> Iterator[tuple[np.ndarray, int]]:
    """Yields sorted normal scores of a range, and the number of scores above the range."""
    parts, size, above = [], 0, 0
    for i in images.rows:
        values = images.normal(i)
        inside, higher = _within(values, low, high)
        parts.append(values[inside])
        size, above = size + len(parts[-1]), above + higher
        if size >= _PART or i == images.rows[-1]:
            part = np.concatenate(parts)
            part.sort()
            yield part, above
            parts, size, above = [], 0, 0
