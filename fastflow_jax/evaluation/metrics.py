"""Image and pixel figures of merit, exact, from raw scores.

Every figure here is a sum or a maximum over the defective samples alone. With

    TP(s), FP(s) = the number of defective, of normal samples whose score is s or more

and P defective and N normal samples, a defective sample of score s contributes

    AUROC   the share of normal samples below s, those equal to s counting half
    AP      the precision at s, TP(s) / (TP(s) + FP(s))
    F1      2 TP(s) / (TP(s) + FP(s) + P)
    AUPRO   the area to the right of its own step in the curve of region overlap over FP / N

so that sorting each class once and one binary search are all that is needed: no thresholds are
binned, ties are exact, and besides the sorted copies the memory is that of one block.

Higher scores are more anomalous. NaN has no rank and is refused; infinities rank as they should.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

from fastflow_jax.errors import InputError

_BLOCK = 1 << 20  # defective samples looked at together


def image_auroc(scores: ArrayLike, labels: ArrayLike) -> float | None:
    """Area under the ROC curve of the image scores.

    Args:
        scores: [B], higher is more anomalous.
        labels: [B], 1 or True for a defective image.

    Returns:
        The chance that a defective image scores higher than a normal one, ties counting half;
        None where there is only one class.

    Raises:
        InputError: on NaN, labels other than 0 and 1, or different shapes.
    """
    return _auroc(*_split(scores, labels))


def pixel_auroc(maps: ArrayLike, masks: ArrayLike | None) -> float | None:
    """Area under the ROC curve over the pixels of all images together.

    Args:
        maps: anomaly maps [B, H, W].
        masks: [B, H, W], True where the image is defective; None where there are no masks.

    Returns:
        The area, or None without masks or with only one class of pixels.

    Raises:
        InputError: as `image_auroc`.
    """
    return None if masks is None else _auroc(*_split(maps, masks))


def average_precision(scores: ArrayLike, labels: ArrayLike | None) -> float | None:
    """Mean precision at the score of each defective sample.

    Equals the sum over thresholds of precision times the step in recall, not interpolated.

    Args:
        scores: image scores [B] or anomaly maps [B, H, W].
        labels: of the same shape, 1 or True for defective; None where there are no masks.

    Returns:
        The average precision, or None where there is only one class.

    Raises:
        InputError: as `image_auroc`.
    """
    if labels is None:
        return None
    positives, negatives = _split(scores, labels)
    if not len(positives) or not len(negatives):
        return None
    total = sum(
        (true / (true + false)).sum() for _, true, false, _ in _counts(positives, negatives)
    )
    return float(total / len(positives))


def auroc_standard_error(auroc: float, n_good: int, n_defective: int) -> float:
    """The standard error of an AUROC (Hanley & McNeil, Radiology 143, 1982).

    An AUROC of 1 is taken as half a pair of the smaller class below it: its error is not 0.

    Args:
      auroc: of so many scores.
      n_good: number of good samples, 1 or more.
      n_defective: number of defective samples, 1 or more.
    """
    a = min(auroc, 1 - 0.5 / min(n_good, n_defective))
    one = a / (2 - a) - a**2  # two defective samples above the same good one
    other = 2 * a**2 / (1 + a) - a**2  # a defective sample above the same two good ones
    variance = a * (1 - a) + (n_defective - 1) * one + (n_good - 1) * other
    return float(np.sqrt(variance / (n_good * n_defective)))


def f1_max(scores: ArrayLike, labels: ArrayLike) -> tuple[float | None, float | None]:
    """Best F1 over all thresholds, and the threshold.

    A sample is called defective where its score is the threshold **or more**. Of several best
    thresholds the lowest is given.

    Args:
        scores: image scores [B] or anomaly maps [B, H, W].
        labels: of the same shape, 1 or True for defective.

    Returns:
        (F1, threshold). With only one class F1 is None, as any scores reach the same value: the
        threshold is the lowest score of defective samples or the highest score of normal samples.
        Without samples, (None, None).

    Raises:
        InputError: as `image_auroc`.
    """
    positives, negatives = _split(scores, labels)
    if not len(positives):
        return None, float(negatives[-1]) if len(negatives) else None
    if not len(negatives):
        return None, float(positives[0])
    best, threshold = -1.0, None
    for block, true, false, _ in _counts(positives, negatives):
        f1 = 2 * true / (true + false + len(positives))
        i = int(np.argmax(f1))  # the first, hence the lowest, as blocks ascend
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

    The overlap at a threshold is the share of a region's pixels that reach it, averaged over the
    regions (8-connected components of the masks), so that a small defect counts as much as a large
    one. It is integrated by trapezoids over the false-positive rate of all normal pixels, from 0 to
    `fpr_limit`, where it is interpolated, and divided by `fpr_limit`.

    Source: Bergmann et al., The MVTec Anomaly Detection Dataset, IJCV 129 (2021).

    Args:
        maps: anomaly maps [B, H, W].
        masks: [B, H, W], True where the image is defective; None where there are no masks.
        fpr_limit: in (0, 1].
        valid: bool [B, H, W], False for pixels that do not count, such as padding, of which none
            is defective; None where all count.

    Returns:
        The normalised area, 1 at best; None without masks or with only one class of pixels.

    Raises:
        InputError: as `image_auroc`, and on a `fpr_limit` out of range.
    """
    if not 0 < fpr_limit <= 1:
        raise InputError(f"fpr_limit is {fpr_limit}: give a rate above 0 and up to 1")
    if masks is None:
        return None
    maps, masks = _check(maps, masks)
    if maps.ndim != 3:
        raise InputError(f"anomaly maps have shape {maps.shape}: [B, H, W] is needed")
    weights = _region_weights(masks)
    positives = maps[masks]
    negatives = maps[~masks if valid is None else valid & ~masks]
    if not len(positives) or not len(negatives):
        return None
    order = np.argsort(positives)
    positives, weights = positives[order], weights[order]
    negatives.sort()
    area = 0.0
    for block, _, false, above in _counts(positives, negatives):
        # The step of a sample begins where the normal samples above it end and is complete with
        # those equal to it: a ramp over ties, a jump without.
        start, end = above / len(negatives), false / len(negatives)
        ramp = np.minimum(end, fpr_limit) - start
        height = np.divide(ramp, end - start, out=np.ones_like(ramp), where=end > start)
        steps = height * ramp / 2 + np.maximum(fpr_limit - end, 0)
        area += np.dot(weights[block], np.where(start < fpr_limit, steps, 0))
    return float(area / fpr_limit)


class PixelCurves(NamedTuple):
    """What a detector makes of pixels, by threshold; as thresholds descend, rates rise."""

    thresholds: np.ndarray  # float64 [T]
    false_positive_rate: np.ndarray  # float64 [T], of normal pixels
    true_positive_rate: (
        np.ndarray
    )  # float64 [T], of defective pixels: with the above, the ROC curve
    overlap: np.ndarray  # float64 [T], of regions: with the same, the curve that `aupro` integrates
    f1: np.ndarray  # float64 [T], of pixels


def pixel_curves(
    maps: ArrayLike,
    masks: ArrayLike | None,
    *,
    valid: np.ndarray | None = None,
    points: int = 200,
) -> PixelCurves | None:
    """The curves behind `pixel_auroc` and `aupro`, to draw them.

    Each point is exact. Thresholds are chosen so that points lie closer the lower the
    false-positive rate is; maps are gone through one by one, so that none are copied or sorted.

    Args:
        maps: anomaly maps [B, H, W].
        masks: [B, H, W], True where the image is defective; None where there are no masks.
        valid: bool [B, H, W], False for pixels that do not count; None where all count.
        points: about half as many thresholds as there are at the most.

    Returns:
        The curves, or None without masks or with only one class of pixels.

    Raises:
        InputError: as `image_auroc`.
    """
    if masks is None:
        return None
    maps, masks = _check(maps, masks)
    counted = np.broadcast_to(True, maps.shape) if valid is None else valid
    every = max(1, maps.size // _BLOCK)  # thresholds may come from some pixels: rates do not
    some = maps.reshape(-1)[::every][counted.reshape(-1)[::every]]
    ranks = 1 - np.linspace(0, 1, points) ** 3
    defective = maps[masks]
    if not len(defective) or not len(some) or counted.sum() == len(defective):
        return None
    thresholds = np.unique(
        np.concatenate(
            [np.quantile(part, ranks, method="nearest") for part in (some, defective)]
        ).astype(np.float64)
    )
    false, true, overlap = np.zeros((3, len(thresholds)))

    def reaching(values, weights=None):  # of which thresholds each value reaches, summed
        place = np.searchsorted(thresholds, values, "right")
        sums = np.bincount(place, weights, minlength=len(thresholds) + 1)
        return np.cumsum(sums[::-1])[::-1][1:]

    weights, start = _region_weights(masks), 0
    for anomaly_map, mask, counts in zip(maps, masks, counted, strict=True):
        false += reaching(anomaly_map[counts & ~mask])
        if mask.any():
            inside = anomaly_map[mask]
            true += reaching(inside)
            overlap += reaching(inside, weights[start : start + len(inside)])
            start += len(inside)
    normal = counted.sum() - len(defective)
    return PixelCurves(
        thresholds[::-1],
        false[::-1] / normal,
        true[::-1] / len(defective),
        overlap[::-1],
        (2 * true / (true + false + len(defective)))[::-1],
    )


def _check(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Scores as float32 or float64, labels as bool, of one shape."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.dtype not in (np.float32, np.float64):
        exact = np.float64 if scores.dtype.kind in "iub" else np.float32
        scores = scores.astype(exact)
    if scores.shape != labels.shape:
        raise InputError(
            f"scores have shape {scores.shape} and labels {labels.shape}: they must be the same"
        )
    if scores.size and np.isnan(scores.min()):
        where = np.argwhere(np.isnan(scores))
        first = ", ".join(str(i) for i in where[0])
        raise InputError(
            f"scores[{first}] is NaN ({len(where)} of {scores.size} scores are): the training has "
            "diverged; train again with a lower learning rate"
        )
    if labels.dtype != bool:
        if not np.isin(labels, (0, 1)).all():
            raise InputError("labels and masks must be 0 (normal) or 1 (defective)")
        labels = labels.astype(bool)
    return scores, labels


def _split(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The scores of the defective and of the normal samples, each in ascending order."""
    scores, labels = _check(scores, labels)
    positives, negatives = scores[labels], scores[~labels]
    positives.sort()
    negatives.sort()
    return positives, negatives


def _counts(
    positives: np.ndarray, negatives: np.ndarray
) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
    """For each block of the sorted defective scores s: TP(s), FP(s), normal samples above s."""
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
    not_below = sum(
        int((false + above).sum()) for _, _, false, above in _counts(positives, negatives)
    )
    pairs = 2 * len(positives) * len(negatives)
    return (pairs - not_below) / pairs


def _region_weights(masks: np.ndarray) -> np.ndarray:
    """What each defective pixel adds to the overlap: 1 / (its region's pixels * all regions)."""
    weights, regions = [], 0
    for mask in masks:
        if mask.any():
            labelled, count = ndimage.label(mask, structure=np.ones((3, 3)))
            labelled = labelled[mask]
            weights.append(1 / np.bincount(labelled)[labelled])
            regions += count
    return np.concatenate(weights) / regions if weights else np.empty(0)
