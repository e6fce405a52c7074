"""Thresholds from normal images alone, with what they promise.

Scores are of normal images that nothing was learnt from, n of them ("held out"), and of new ones.
All that is said of new normal images supposes that they are drawn as those held out were
(exchangeable): another camera, light or material is another thing. Images of the same part are not
drawn independently of each other; give their groups.

- `p_values`: how often a normal image scores so high (conformal; Vovk, Gammerman & Shafer,
  Algorithmic Learning in a Random World, 2005).
- `image_threshold`, `pixel_threshold`: for a stated rate of false alarms, with the interval that
  the true rate lies in.
- `f1_optimal`: the threshold that suits some labelled images best, which promises nothing.
"""

import dataclasses
import warnings

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from fastflow_jax.errors import InputError
from fastflow_jax.evaluation.metrics import f1_max

# Parts of a map's pixels whose lowest value is kept, from all of them to the highest alone.
EXCEEDANCES = np.concatenate([np.logspace(0, -5, 101), [0.0]])


@dataclasses.dataclass(frozen=True)
class Threshold:
    """What scores **above** it are called anomalous; and what is known of it."""

    value: float
    kind: str = "given"  # "image" or "pixel": for a rate of false alarms; "f1"; or "given"
    rate: float | None = None  # of false alarms that was asked for
    interval: tuple[float, float] | None = None  # that the true rate lies in,
    confidence: float | None = None  # with this probability
    n: int = 0  # images that it comes from; of grouped ones, groups
    supported: bool = True  # so many images can tell of such a rate


def p_values(scores: ArrayLike, held_out: ArrayLike, groups: ArrayLike | None = None) -> np.ndarray:
    """(1 + #{held-out scores >= s}) / (n + 1) for each score s.

    Of a new normal image, P(p <= a) <= a for every a, whatever the distribution of scores.

    With groups the count is the sum over groups of the share of their images that score at least
    s, and n the number of groups. The promise is then that of a new image of a new group, for
    groups that are exchangeable, however alike their images are (Lee, Barber & Willett,
    Distribution-Free Inference with Hierarchical Data, 2023).

    Args:
      scores: any shape.
      held_out: scores of normal images that nothing was learnt from, [n].
      groups: [n], equal for images of the same part; None: each image is a group.
    """
    order = np.argsort(held_out, kind="stable")
    weights = _weights(groups, len(order))
    above = np.append(np.cumsum(weights[order][::-1])[::-1], 0.0)  # weight from each rank on
    first = np.searchsorted(np.asarray(held_out)[order], np.asarray(scores), side="left")
    return (1 + above[first]) / (_n_groups(weights) + 1)


def image_threshold(
    held_out: ArrayLike,
    rate: float,
    confidence: float = 0.95,
    *,
    groups: ArrayLike | None = None,
    warn: bool = True,
) -> Threshold:
    """The k-th lowest held-out score, k = ceil((n + 1)(1 - rate)), and a margin.

    A score is above it where its p-value is `rate` or less, which happens to a new normal image
    with a probability of at most `rate`, on average over the draws of held-out images. For one
    draw, the probability is that of the n + 1 - k highest of n uniform numbers and one more:
    Beta(n + 1 - k, k) where no scores tie, and stochastically less where some do. Where rate <
    1 / (n + 1), the highest held-out score is taken, whose rate is higher; a warning says so.

    The margin, 1e-4 of the scores' size and at most half the distance to the next score, keeps the
    decision on that image independent of the batch in which it is scored.

    With groups, n and k count groups, each of whose images has an equal share in its group: see
    `p_values`. The interval is then that of one image per group, which is the widest.

    Args:
      held_out: scores of normal images that nothing was learnt from, [n].
      rate: of false alarms, a part of all normal images.
      confidence: of the interval.
      groups: [n], equal for images of the same part; None: each image is a group.
      warn: False leaves what cannot be promised to `Threshold.supported`.

    Raises:
      InputError: no held-out scores, or a rate or confidence that is not between 0 and 1.
    """
    scores = _checked(held_out, rate, confidence)
    weights = _weights(groups, len(scores))
    order = np.argsort(scores, kind="stable")
    scores, n = scores[order], _n_groups(weights)
    # Rounded first: (n + 1)(1 - rate) may miss a whole number by rounding.
    weight = np.round((n + 1) * (1 - rate), 9)
    k = max(1, int(np.ceil(weight)))
    supported = k <= n
    k = min(k, n)
    reached = np.round(weights[order].cumsum(), 9)
    place = min(int(np.searchsorted(reached, weight)), len(scores) - 1)
    alpha = (1 - confidence) / 2
    interval = special.betaincinv(n + 1 - k, k, [alpha, 1 - alpha])
    if warn and not supported:
        takes = int(np.ceil(np.round(1 / rate, 9))) - 1
        what = "images" if groups is None else "groups"
        warnings.warn(
            f"{n} held-out {what} cannot support a false-alarm rate of {rate:g}: it takes {takes}. "
            "The highest held-out score is taken, whose "
            f"rate is {1 / (n + 1):.3g} on average; hold out more {what}.",
            stacklevel=2,
        )
    value = scores[place] + _margin(scores, place)
    return Threshold(
        float(value), "image", rate, tuple(map(float, interval)), confidence, n, supported
    )


_RELATIVE_MARGIN = 1e-4  # scores of one image in two batches differ by some 1e-6


def _margin(scores: np.ndarray, place: int) -> float:
    """What a threshold at a place of sorted scores is raised by, see `image_threshold`."""
    higher = scores[np.searchsorted(scores, scores[place], side="right") :]
    size = max(abs(scores[place]), scores[-1] - scores[0])
    gap = higher[0] - scores[place] if len(higher) else np.inf
    return min(_RELATIVE_MARGIN * size, gap / 2)


def _weights(groups: ArrayLike | None, n: int) -> np.ndarray:
    """1 / (number of images in its group) for each of n images, float64 [n]."""
    if groups is None:
        return np.ones(n)
    _, group, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    return 1 / sizes[group]


def _n_groups(weights: np.ndarray) -> int:
    return round(weights.sum())


def tails(maps: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """The values that `EXCEEDANCES` of each map's pixels reach, [n, Q], for `pixel_threshold`.

    Args:
      maps: [n, H, W].
      valid: bool [n, H, W], False for pixels that do not count; None where all do.
    """
    if valid is None:
        return np.quantile(maps.reshape(len(maps), -1), 1 - EXCEEDANCES, axis=1).T
    return np.array([np.quantile(m[v], 1 - EXCEEDANCES) for m, v in zip(maps, valid, strict=True)])


def exceeded(held_out_tails: np.ndarray, value: float) -> np.ndarray:
    """The part of each map's pixels that lies above a value, [n], from its `tails`."""
    return np.array([np.interp(value, t, EXCEEDANCES) for t in held_out_tails])


def pixel_threshold(
    held_out_tails: np.ndarray,
    rate: float,
    confidence: float = 0.95,
    *,
    groups: ArrayLike | None = None,
    warn: bool = True,
) -> Threshold:
    """The value that a part `rate` of held-out pixels lies above, on average over the images.

    Pixels of one image resemble each other, so that the spread between images, not the number of
    pixels, tells how well the rate is known: the interval is that of a binomial share of as many
    independent pixels as would spread so (Korn & Graubard, Survey Methodology 24, 1998). It is an
    approximation, better the more images there are; nothing is promised of a single image.

    Args:
      held_out_tails: see `tails`.
      rate: of false alarms, a part of all pixels of normal images.
      confidence: of the interval.
      groups: [n], as of `image_threshold`; images are replaced by the means of groups.
      warn: as of `image_threshold`; here the images support a rate that they show with a
        deviation no larger than itself.

    Raises:
      InputError: as `image_threshold`.
    """
    held_out_tails = np.asarray(held_out_tails, np.float64)
    _checked(held_out_tails[:, 0] if held_out_tails.size else [], rate, confidence)
    low, high = held_out_tails.min(), held_out_tails.max()
    for _ in range(60):
        middle = (low + high) / 2
        above = _by_group(exceeded(held_out_tails, middle), groups).mean() > rate
        low, high = (middle, high) if above else (low, middle)
    shares = _by_group(exceeded(held_out_tails, high), groups)
    n = len(shares)
    interval, independent = _binomial_interval(shares, confidence)
    supported = independent * rate >= 1
    if warn and not supported:
        what = "images" if groups is None else "groups"
        warnings.warn(
            f"{n} held-out {what} cannot support a rate of {rate:g} of their pixels: they differ "
            f"from each other as much as {independent:.0f} independent pixels would; hold out more "
            f"{what}.",
            stacklevel=2,
        )
    return Threshold(float(high), "pixel", rate, interval, confidence, n, supported)


def _by_group(values: np.ndarray, groups: ArrayLike | None) -> np.ndarray:
    """The mean of each group's values."""
    if groups is None:
        return values
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    return np.bincount(group, values) / np.bincount(group)


def _binomial_interval(shares: np.ndarray, confidence: float) -> tuple[tuple[float, float], float]:
    """Of the mean of shares that differ between images; and the effective number of draws."""
    n, mean, alpha = len(shares), shares.mean(), (1 - confidence) / 2
    if n < 2:
        return (0.0, 1.0), 0.0
    variance = shares.var(ddof=1) / n
    draws = mean * (1 - mean) / variance if variance else float(n)
    # Few images, wide interval.
    draws *= (special.ndtri(alpha) / special.stdtrit(n - 1, alpha)) ** 2
    hits = draws * mean
    low = special.betaincinv(hits, draws - hits + 1, alpha) if hits else 0.0
    high = special.betaincinv(hits + 1, draws - hits, 1 - alpha) if hits < draws else 1.0
    return (float(low), float(high)), float(draws)


def f1_optimal(scores: ArrayLike, labels: ArrayLike) -> Threshold:
    """The threshold of the highest F1 on labelled images: chosen on them, it flatters itself there.

    It lies midway between two neighbouring scores, or below the lowest score by 1 % of the distance
    from there to the median. The score of an image changes by about 1e-6 of its value from one
    batch size to another, which changes no decision there.

    Args:
      scores: [B], or maps [B, H, W] with masks for labels.
      labels: 1 or True for anomalous.

    Raises:
      InputError: no image is labelled anomalous, or see `metrics.f1_max`.
    """
    lowest = f1_max(scores, labels)[1]  # of the scores to be called anomalous
    if not np.any(labels):
        raise InputError(
            "There are no labelled anomalies. Label at least one, or choose the threshold by a "
            "false-alarm rate."
        )
    return Threshold(_midway_below(lowest, np.asarray(scores)), "f1", n=len(labels))


def _midway_below(score: float, scores: np.ndarray) -> float:
    """The middle between a score and the next lower one, rounded to float32 as anomaly maps are."""
    lower = scores[scores < score]
    if lower.size:
        neighbour = float(lower.max())
    else:
        spread = float(np.median(scores)) - score
        margin = max(0.01 * spread, 1e-5 * abs(score), float(np.finfo(np.float32).tiny))
        neighbour = score - 2 * margin
    middle = float(np.float32(0.5 * neighbour + 0.5 * score))
    return middle if neighbour <= middle < score else neighbour


def _checked(held_out: ArrayLike, rate: float, confidence: float) -> np.ndarray:
    for name, number in (("rate of false alarms", rate), ("confidence", confidence)):
        if not 0 < number < 1:
            raise InputError(f"a {name} is between 0 and 1, not {number}")
    held_out = np.asarray(held_out, np.float64)
    if not len(held_out):
        raise InputError("there are no held-out images: train with config.data.holdout above 0")
    return held_out
