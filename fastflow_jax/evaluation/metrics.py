"""Image and pixel metrics, exact, from raw scores.

Let TP(s) and FP(s) be the numbers of defective and normal samples with a score of at least s, and
P and N the numbers of all defective and normal samples. Each metric is a sum or a maximum over the
defective samples. A defective sample with score s contributes

    AUROC   the share of normal samples with a score below s; equal scores count half
    AP      the precision at s, TP(s) / (TP(s) + FP(s))
    F1      2 TP(s) / (TP(s) + FP(s) + P)
    AUPRO   the area to the right of its step in the curve of region overlap over FP / N

Sorting each class once and a binary search per defective sample give all counts. Thresholds are
not binned, and ties are exact. Beside sorted copies, memory is needed for one block of samples.

Higher scores are more anomalous; infinities are allowed. All functions raise InputError for NaN,
labels or masks other than 0 and 1, and shapes that differ.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

from fastflow_jax.errors import InputError

_BLOCK = 1 << 20  # defective samples per block
_POINTS = 200  # of pixel curves, for each class of pixels


def image_auroc(scores: ArrayLike, labels: ArrayLike) -> float | None:
    """Area under the ROC curve of image scores.

    It is the probability that a defective image has a higher score than a normal one, where equal
    scores count half.

    Args:
      scores: [B].
      labels: [B], 1 or True for defective images. Labels of one class give None.
    """
    return _auroc(*_split(scores, labels))


def pixel_auroc(maps: ArrayLike, masks: ArrayLike | None) -> float | None:
    """Area under the ROC curve of the pixels of all images together.

    Args:
      maps: anomaly maps [B, H, W].
      masks: [B, H, W], True in defects. None, or masks of one class, give None.
    """
    return None if masks is None else _auroc(*_split(maps, masks))


def average_precision(scores: ArrayLike, labels: ArrayLike | None) -> float | None:
    """Mean precision at the scores of the defective samples.

    Equals the sum over thresholds of precision times the step in recall, without interpolation.

    Args:
      scores: image scores [B] or anomaly maps [B, H, W].
      labels: same shape, 1 or True for defective. None, or labels of one class, give None.
    """
    if labels is None:
        return None
    positives, negatives = _split(scores, labels)
    if not len(positives) or not len(negatives):
        return None
    counts = _counts(positives, negatives)
    return float(sum((tp / (tp + fp)).sum() for _, tp, fp, _ in counts) / len(positives))


def auroc_standard_error(auroc: float, n_good: int, n_defective: int) -> float:
    """Standard error of an AUROC (Hanley & McNeil, Radiology 143, 1982).

    The AUROC is limited to 1 - 0.5 / (samples of the smaller class), so the error is above 0.

    Args:
      auroc: from 0 to 1.
      n_good: number of good samples, at least 1.
      n_defective: number of defective samples, at least 1.
    """
    a = min(auroc, 1 - 0.5 / min(n_good, n_defective))
    one = a / (2 - a) - a**2  # two defective samples above the same good one
    other = 2 * a**2 / (1 + a) - a**2  # a defective sample above the same two good ones
    variance = a * (1 - a) + (n_defective - 1) * one + (n_good - 1) * other
    return float(np.sqrt(variance / (n_good * n_defective)))


def f1_max(scores: ArrayLike, labels: ArrayLike) -> tuple[float | None, float | None]:
    """Best F1 over all thresholds, and its threshold.

    A sample counts as called defective if its score is **at least** the threshold. If several
    thresholds are best, the lowest is returned.

    Args:
      scores: image scores [B] or anomaly maps [B, H, W].
      labels: same shape, 1 or True for defective.

    Returns:
      (F1, threshold). With only one class, F1 is None, because all scores reach the same value; the
      threshold is the lowest score of defective samples or the highest score of normal samples.
      Without samples, (None, None).
    """
    positives, negatives = _split(scores, labels)
    if not len(positives):
        return None, float(negatives[-1]) if len(negatives) else None
    if not len(negatives):
        return None, float(positives[0])
    best, threshold = -1.0, None
    for block, true, false, _ in _counts(positives, negatives):
        f1 = 2 * true / (true + false + len(positives))
        i = int(np.argmax(f1))  # the first, and so the lowest, because blocks ascend
        if f1[i] > best:
            best, threshold = float(f1[i]), float(positives[block][i])
    return best, threshold


def aupro(
    maps: ArrayLike,
    masks: ArrayLike | None,
    fpr_limit: float = 0.3,
    *,
    valid: np.ndarray | None = None,
) -> float | None:
    """Area under the per-region-overlap curve, as in MVTec AD.

    The overlap at a threshold is the share of a region's pixels with a value of at least the
    threshold, averaged over the regions (8-connected components of the masks), so small and large
    defects have equal weight. The curve over the false-positive rate of all normal pixels is
    integrated by trapezoids from 0 to `fpr_limit`, interpolated there, and divided by `fpr_limit`.

    Source: Bergmann et al., The MVTec Anomaly Detection Dataset, IJCV 129 (2021).

    Args:
      maps: anomaly maps [B, H, W].
      masks: [B, H, W], True in defects, or None if there are no masks.
      fpr_limit: above 0 and at most 1, else InputError is raised.
      valid: bool [B, H, W], False in padded pixels, none of which is defective, or None if there
        is no padding.

    Returns:
      The normalised area, at most 1; None without masks or with only one class of pixels.
    """
    areas = aupros(maps, masks, (fpr_limit,), valid=valid)
    return None if areas is None else areas[0]


def aupros(
    maps: ArrayLike,
    masks: ArrayLike | None,
    fpr_limits: Sequence[float],
    *,
    valid: np.ndarray | None = None,
) -> list[float] | None:
    """Areas of `aupro` up to each of several limits, from one curve.

    Args:
      maps: anomaly maps [B, H, W].
      masks: [B, H, W], True in defects, or None if there are no masks.
      fpr_limits: each above 0 and at most 1, else InputError is raised.
      valid: see `aupro`.

    Returns:
      An area for each limit; None without masks or with only one class of pixels.
    """
    for limit in fpr_limits:
        if not 0 < limit <= 1:
            raise InputError(f"fpr_limit is {limit}. It must be above 0 and at most 1.")
    if masks is None:
        return None
    maps, masks = _check(maps, masks)
    if maps.ndim != 3:
        raise InputError(f"Anomaly maps have shape {maps.shape}. They must be [B, H, W].")
    weights = region_weights(masks)
    positives = maps[masks]
    negatives = maps[~masks if valid is None else valid & ~masks]
    if not len(positives) or not len(negatives):
        return None
    order = np.argsort(positives)
    positives, weights = positives[order], weights[order]
    negatives.sort()
    areas = [0.0 for _ in fpr_limits]
    for block, _, false, above in _counts(positives, negatives):
        # The overlap rises from the rate of normal pixels above the sample to the rate that
        # includes those equal to it: a ramp with ties, a jump without.
        start, end = above / len(negatives), false / len(negatives)
        for i, limit in enumerate(fpr_limits):
            ramp = np.minimum(end, limit) - start
            height = np.divide(ramp, end - start, out=np.ones_like(ramp), where=end > start)
            steps = height * ramp / 2 + np.maximum(limit - end, 0)
            areas[i] += np.dot(weights[block], np.where(start < limit, steps, 0))
    return [float(area / limit) for area, limit in zip(areas, fpr_limits, strict=True)]


class PixelCurves(NamedTuple):
    """Rates of pixels at T thresholds, which descend, so that rates ascend."""

    thresholds: np.ndarray  # float64 [T]
    false_positive_rate: np.ndarray  # float64 [T], of normal pixels
    true_positive_rate: np.ndarray  # float64 [T], of defective pixels
    overlap: np.ndarray  # float64 [T], mean over the regions, see `aupro`
    f1: np.ndarray  # float64 [T], of pixels


def pixel_curves(
    maps: ArrayLike,
    masks: ArrayLike | None,
    *,
    valid: np.ndarray | None = None,
) -> PixelCurves | None:
    """Points of the curves behind `pixel_auroc` and `aupro`, for plots.

    Each point is exact. Thresholds are closer together at low false-positive rates. Maps are
    processed one by one, so that no copy of all maps is made.

    Args:
      maps: anomaly maps [B, H, W].
      masks: [B, H, W], True in defects, or None if there are no masks.
      valid: bool [B, H, W], False in padded pixels, or None if there is no padding.

    Returns:
      The curves; None without masks or with only one class of pixels.
    """
    if masks is None:
        return None
    maps, masks = _check(maps, masks)
    counted = np.broadcast_to(True, maps.shape) if valid is None else valid
    every = max(1, maps.size // _BLOCK)  # a sample of pixels is enough to choose thresholds
    some = maps.reshape(-1)[::every][counted.reshape(-1)[::every]]
    ranks = 1 - np.linspace(0, 1, _POINTS) ** 3
    defective = maps[masks]
    if not len(defective) or not len(some) or counted.sum() == len(defective):
        return None
    quantiles = [np.quantile(part, ranks, method="nearest") for part in (some, defective)]
    thresholds = np.unique(np.concatenate(quantiles).astype(np.float64))
    false, true, overlap = np.zeros((3, len(thresholds)))

    def reaching(values, weights=None):  # number or weight of the values >= each threshold
        place = np.searchsorted(thresholds, values, "right")
        sums = np.bincount(place, weights, minlength=len(thresholds) + 1)
        return np.cumsum(sums[::-1])[::-1][1:]

    weights, start = region_weights(masks), 0
    for anomaly_map, mask, counts in zip(maps, masks, counted, strict=True):
        false += reaching(anomaly_map[counts & ~mask])
        if mask.any():
            inside = anomaly_map[mask]
            true += reaching(inside)
            overlap += reaching(inside, weights[start : start + len(inside)])
            start += len(inside)
    normal = counted.sum() - len(defective)
    f1 = 2 * true / (true + false + len(defective))
    rates = false / normal, true / len(defective), overlap, f1
    return PixelCurves(*(values[::-1] for values in (thresholds, *rates)))


def region_weights(masks: np.ndarray) -> np.ndarray:
    """Weight of each defective pixel in the overlap: 1 / (pixels of its region * regions).

    Args:
      masks: bool [B, H, W], True in defects.

    Returns:
      float64 [P], in the order of `maps[masks]`.
    """
    weights, regions = [], 0
    for mask in masks:
        if mask.any():
            found = ndimage.label(mask, structure=np.ones((3, 3)))
            labelled, count = cast(tuple[np.ndarray, int], found)
            labelled = labelled[mask]
            weights.append(1 / np.bincount(labelled)[labelled])
            regions += count
    return np.concatenate(weights) / regions if weights else np.empty(0)


def _check(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores as float32 or float64 and labels as bool, of one shape."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.dtype not in (np.float32, np.float64):
        exact = np.float64 if scores.dtype.kind in "iub" else np.float32
        scores = scores.astype(exact)
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


def _split(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Returns the scores of defective and of normal samples, each ascending."""
    scores, labels = _check(scores, labels)
    positives, negatives = scores[labels], scores[~labels]
    positives.sort()
    negatives.sort()
    return positives, negatives


def _counts(
    positives: np.ndarray, negatives: np.ndarray
) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
    """Yields blocks of the sorted defective scores s: slice, TP(s), FP(s), normal samples above s.

    A sample is above s if its score is higher; those equal to s are counted in FP(s) alone.
    """
    for start in range(0, len(positives), _BLOCK):
        block = slice(start, start + _BLOCK)
        scores = positives[block]
        true = len(positives) - np.searchsorted(positives, scores, "left")
        false = len(negatives) - np.searchsorted(negatives, scores, "left")
        above = len(negatives) - np.searchsorted(negatives, scores, "right")
        yield block, true, false, above


def _auroc(positives: np.ndarray, negatives: np.ndarray) -> float | None:
    if not len(positives) or not len(negatives):
        return None
    counts = _counts(positives, negatives)
    not_below = sum(int((false + above).sum()) for _, _, false, above in counts)
    pairs = 2 * len(positives) * len(negatives)
    return (pairs - not_below) / pairs
