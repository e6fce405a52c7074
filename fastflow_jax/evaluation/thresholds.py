"""Thresholds and p-values from the scores of n held-out normal images.

All statements on new normal images assume that new and held-out images are exchangeable. Another
camera, light or material breaks this. Images of the same part are not independent: pass groups.

- `p_values`: conformal p-values of image scores (Vovk, Gammerman & Shafer, Algorithmic Learning in
  a Random World, 2005).
- `image_threshold`, `pixel_threshold`: thresholds for a false-alarm rate, with a confidence
  interval of the true rate.
- `f1_optimal`: the best threshold for labelled images, without a statement on new images.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable

import numpy as np
import scipy
from numpy.typing import ArrayLike

from fastflow_jax.decision import Threshold, group_weights, rows_by_kind
from fastflow_jax.errors import InputError
from fastflow_jax.evaluation.metrics import f1_max

DEFAULT_RATE = 0.05  # false-alarm rate of images, if enough are held out
# Shares of a map's pixels whose lowest value `tails` stores, from all pixels to the highest alone.
EXCEEDANCES = np.concatenate([np.logspace(0, -5, 101), [0.0]])


def fewest(rate: float) -> int:
    """Returns the smallest number n of held-out images that supports a rate: 1 / (n + 1) <= rate.

    Args:
      rate: false-alarm rate, between 0 and 1.
    """
    return int(np.ceil(np.round(1 / rate, 9))) - 1


def default_rate(n: int) -> float:
    """Returns `DEFAULT_RATE`, or the lowest rate that n images support if that is higher.

    Args:
      n: number of held-out images, or of groups.
    """
    return max(DEFAULT_RATE, 1 / (n + 1))


def image_threshold(
    held_out: ArrayLike,
    rate: float,
    confidence: float = 0.95,
    *,
    groups: ArrayLike | None = None,
    kinds: ArrayLike | None = None,
    warn: bool = True,
) -> Threshold:
    """Returns the k-th lowest held-out score, k = ceil((n + 1)(1 - rate)), plus a margin.

    A score is above it if its p-value is at most `rate`. The probability of this for a new normal
    image, averaged over draws of the held-out images, is at most `rate`. For one draw it follows
    Beta(n + 1 - k, k) without ties and is stochastically smaller with ties. If rate < 1 / (n + 1),
    the highest held-out score is used and a warning states its higher rate.

    The margin is 1e-4 of the magnitude of the scores, at most half the distance to the next score.
    It keeps the decision on that image independent of the batch that it is scored in.

    With groups, n and k count groups, and images share the weight of their group, see `p_values`.
    The interval is that of one image per group, the widest.

    With kinds, the highest threshold of a kind is returned: the rate then holds for new images of
    every kind (Vovk, Lindsay, Nouretdinov & Gammerman, Mondrian Confidence Machine, 2003).

    Args:
      held_out: scores of held-out images [n].
      rate: false-alarm rate, between 0 and 1.
      confidence: of the interval, between 0 and 1.
      groups: [n], equal for images of the same part, or None if each shows another part.
      kinds: int [n], equal for images of the same kind, such as one lighting; None for one kind.
      warn: False silences the warning; see `Threshold.supported`.

    Raises:
      InputError: no held-out scores, or a rate or confidence outside (0, 1).
    """
    scores = _checked(held_out, rate, confidence)
    if kinds is not None:
        choose = functools.partial(image_threshold, rate=rate, confidence=confidence, warn=warn)
        return _highest(choose, scores, groups, kinds)
    weights, n = group_weights(groups, len(scores))
    order = np.argsort(scores, kind="stable")
    scores = scores[order]
    # Rounded, because (n + 1)(1 - rate) may miss a whole number by a rounding error.
    weight = np.round((n + 1) * (1 - rate), 9)
    k = max(1, int(np.ceil(weight)))
    supported = k <= n
    k = min(k, n)
    reached = np.round(weights[order].cumsum(), 9)
    place = min(int(np.searchsorted(reached, weight)), len(scores) - 1)
    alpha = (1 - confidence) / 2
    low, high = scipy.special.betaincinv(n + 1 - k, k, [alpha, 1 - alpha])
    if warn and not supported:
        units = _units(groups)
        warnings.warn(
            f"{n} held-out {units} cannot support a false-alarm rate of {rate:g} ({fewest(rate)} "
            "are needed). The highest held-out score is the threshold, with a rate of "
            f"{1 / (n + 1):.3g} on average. Hold out more {units} for a lower rate.",
            stacklevel=2,
        )
    value = float(scores[place] + _margin(scores, place))
    return Threshold(value, "image", rate, (float(low), float(high)), confidence, n, supported)


_RELATIVE_MARGIN = 1e-4  # scores of one image in two batches differ by about 1e-6


def _margin(scores: np.ndarray, place: int) -> float:
    """Margin at an index of the sorted scores, see `image_threshold`."""
    higher = scores[np.searchsorted(scores, scores[place], side="right") :]
    size = max(abs(scores[place]), scores[-1] - scores[0])
    gap = higher[0] - scores[place] if len(higher) else np.inf
    return min(_RELATIVE_MARGIN * size, gap / 2)


def _units(groups: ArrayLike | None) -> str:
    return "images" if groups is None else "groups"


def tails(maps: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Computes the value that each share in `EXCEEDANCES` of a map's pixels reaches, [n, Q].

    Args:
      maps: anomaly maps [n, H, W].
      valid: bool [n, H, W], False in padded pixels, or None if there is no padding.
    """
    if valid is None:
        return np.quantile(maps.reshape(len(maps), -1), 1 - EXCEEDANCES, axis=1).T
    return np.array([np.quantile(m[v], 1 - EXCEEDANCES) for m, v in zip(maps, valid, strict=True)])


def pixel_threshold(
    held_out_tails: np.ndarray,
    rate: float,
    confidence: float = 0.95,
    *,
    groups: ArrayLike | None = None,
    kinds: ArrayLike | None = None,
    warn: bool = True,
) -> Threshold:
    """Returns the value that a share `rate` of held-out pixels exceeds, averaged over the images.

    Pixels of one image are dependent, so the precision of the rate follows from the variation
    between images. The interval is that of a binomial proportion with the number of independent
    pixels that would vary as much (Korn & Graubard, Survey Methodology 24, 1998). It is approximate
    and improves with the number of images. Single images may have a higher rate.

    Args:
      held_out_tails: `tails` of held-out images [n, Q].
      rate: false-alarm rate of pixels, between 0 and 1.
      confidence: of the interval, between 0 and 1.
      groups: [n], equal for images of the same part; their shares are averaged first.
      kinds: see `image_threshold`.
      warn: False silences the warning that the rate is not supported: that its standard deviation,
        estimated from the images, is larger than the rate.

    Raises:
      InputError: as `image_threshold`.
    """
    held_out_tails = np.asarray(held_out_tails, np.float64)
    _checked(held_out_tails[:, 0] if held_out_tails.size else [], rate, confidence)
    if kinds is not None:
        choose = functools.partial(pixel_threshold, rate=rate, confidence=confidence, warn=warn)
        return _highest(choose, held_out_tails, groups, kinds)

    def shares_above(value: float) -> np.ndarray:  # of the pixels of each image or group
        return _by_group([np.interp(value, t, EXCEEDANCES) for t in held_out_tails], groups)

    low, high = held_out_tails.min(), held_out_tails.max()
    for _ in range(60):
        middle = (low + high) / 2
        is_above = shares_above(middle).mean() > rate
        low, high = (middle, high) if is_above else (low, middle)
    shares = shares_above(high)
    n = len(shares)
    interval, independent = _binomial_interval(shares, confidence)
    supported = independent * rate >= 1
    if warn and not supported:
        units = _units(groups)
        warnings.warn(
            f"{n} held-out {units} cannot support a rate of {rate:g} of their pixels: they vary as "
            f"much as {independent:.0f} independent pixels. Hold out more {units}.",
            stacklevel=2,
        )
    return Threshold(float(high), "pixel", rate, interval, confidence, n, supported)


def _highest(
    choose: Callable[..., Threshold], held_out: np.ndarray, groups: ArrayLike | None, kinds
) -> Threshold:
    """The highest threshold of a kind, supported if those of all kinds are."""
    labels = None if groups is None else np.asarray(groups)
    limits = [
        choose(held_out[rows], groups=None if labels is None else labels[rows])
        for rows in rows_by_kind(kinds, len(held_out))
    ]
    highest = max(limits, key=lambda limit: limit.value)
    return dataclasses.replace(highest, supported=all(limit.supported for limit in limits))


def _by_group(values: ArrayLike, groups: ArrayLike | None) -> np.ndarray:
    """Returns the mean value of each group."""
    if groups is None:
        return np.asarray(values)
    _, group, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    return np.bincount(group, np.asarray(values)) / sizes


def _binomial_interval(shares: np.ndarray, confidence: float) -> tuple[tuple[float, float], float]:
    """Returns the interval of the mean of `shares`, and the effective number of draws."""
    n, mean, alpha = len(shares), shares.mean(), (1 - confidence) / 2
    if n < 2:
        return (0.0, 1.0), 0.0
    variance = shares.var(ddof=1) / n
    draws = mean * (1 - mean) / variance if variance else float(n)
    wider = scipy.special.ndtri(alpha) / scipy.special.stdtrit(n - 1, alpha)  # for few images
    draws *= wider**2
    hits = draws * mean
    low = scipy.special.betaincinv(hits, draws - hits + 1, alpha) if hits else 0.0
    high = scipy.special.betaincinv(hits + 1, draws - hits, 1 - alpha) if hits < draws else 1.0
    return (float(low), float(high)), float(draws)


def f1_optimal(scores: ArrayLike, labels: ArrayLike) -> Threshold:
    """Returns the threshold with the highest F1 on labelled images, optimistic for those images.

    It is midway between two neighbouring scores, or below the lowest score by 1 % of the distance
    from there to the median. Scores of one image differ by about 1e-6 of their value between batch
    sizes, which does not change decisions at such a threshold.

    Args:
      scores: image scores [B], or anomaly maps [B, H, W] with masks as labels.
      labels: same shape, 1 or True for anomalous.

    Raises:
      InputError: no label is anomalous, or as `metrics.f1_max`.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    lowest = f1_max(scores, labels)[1]  # lowest anomalous score
    if lowest is None or not labels.any():
        raise InputError(
            "There are no labelled anomalies. Label at least one, or choose the threshold by a "
            "false-alarm rate."
        )
    return Threshold(_midway_below(lowest, scores), "f1", n=len(labels))


def _midway_below(score: float, scores: np.ndarray) -> float:
    """Returns the middle between a score and the next lower one, rounded to float32 as maps are."""
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
    for name, number in (("false-alarm rate", rate), ("confidence", confidence)):
        if not 0 < number < 1:
            raise InputError(f"The {name} is {number}. It must be between 0 and 1 (0.05 is 5 %).")
    held_out = np.asarray(held_out, np.float64)
    if not len(held_out):
        raise InputError("There are no held-out images. Train with config.data.holdout above 0.")
    return held_out
