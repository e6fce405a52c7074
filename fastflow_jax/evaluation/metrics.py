"""Image and pixel metrics, exact, from raw scores; `ranking` has their definitions.

Higher scores are more anomalous; infinities are allowed. All functions raise InputError for NaN,
labels or masks other than 0 and 1, and shapes that differ.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import scipy
from numpy.typing import ArrayLike

from fastflow_jax.errors import InputError
from fastflow_jax.evaluation.ranking import check, figures

_MOST = 1 << 20  # pixels that choose the thresholds of curves
_POINTS = 200  # of pixel curves, for each class of pixels


def image_auroc(scores: ArrayLike, labels: ArrayLike) -> float | None:
    """Area under the ROC curve of image scores.

    It is the probability that a defective image has a higher score than a normal one, where equal
    scores count half.

    Args:
      scores: [B].
      labels: [B], 1 or True for defective images. Labels of one class give None.
    """
    found = figures(scores, labels)
    return found and found.auroc


def pixel_auroc(maps: ArrayLike, masks: ArrayLike | None) -> float | None:
    """Area under the ROC curve of the pixels of all images together.

    Args:
      maps: anomaly maps [B, H, W].
      masks: [B, H, W], True in defects. None, or masks of one class, give None.
    """
    return None if masks is None else image_auroc(maps, masks)


def average_precision(scores: ArrayLike, labels: ArrayLike | None) -> float | None:
    """Mean precision at the scores of the defective samples.

    Equals the sum over thresholds of precision times the step in recall, without interpolation.

    Args:
      scores: image scores [B] or anomaly maps [B, H, W].
      labels: same shape, 1 or True for defective. None, or labels of one class, give None.
    """
    found = None if labels is None else figures(scores, labels)
    return found and found.average_precision


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
    found = figures(scores, labels)
    if found is not None:
        return found.f1, found.threshold
    scores, labels = check(scores, labels)
    if not scores.size:
        return None, None
    return None, float(scores.min() if labels.any() else scores.max())


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
    if masks is None:
        return None
    maps, masks = check(maps, masks)
    if maps.ndim != 3:
        raise InputError(f"Anomaly maps have shape {maps.shape}. They must be [B, H, W].")
    overlap = {"overlap": lambda i: overlap_weights(masks[i])}
    found = figures(maps, masks, valid=valid, weights=overlap, fpr_limits=fpr_limits)
    return found and found.areas["overlap"]


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
    maps, masks = check(maps, masks)
    counted = np.broadcast_to(True, maps.shape) if valid is None else valid
    every = max(1, maps.size // _MOST)  # a sample of pixels is enough to choose thresholds
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
    weights = np.concatenate([np.empty(0), *map(overlap_weights, masks)])
    return weights / max(1, round(weights.sum()))


def overlap_weights(mask: np.ndarray) -> np.ndarray:
    """Returns 1 / (pixels of its region) for each defective pixel of a mask, float64 [p].

    Args:
      mask: bool [H, W]. Its regions are 8-connected components.
    """
    regions = regions_of(mask)[mask]
    return 1 / np.bincount(regions)[regions] if len(regions) else np.empty(0)


def regions_of(mask: np.ndarray) -> np.ndarray:
    """Returns the number of each pixel's region, int32 [H, W], from 1 on; 0 in normal pixels.

    Args:
      mask: bool [H, W], True in defective pixels; pixels that touch at a corner are in the same
        region.
    """
    if not mask.any():
        return np.zeros(mask.shape, np.int32)
    found = scipy.ndimage.label(mask, structure=np.ones((3, 3)))
    return cast(tuple[np.ndarray, int], found)[0]
