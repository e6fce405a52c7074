"""Overlap of anomaly maps with single defects: AUPIMO, sPRO, and F1 and recall at a threshold.

All functions read maps and masks image by image; both may be memory maps. Higher values are more
anomalous.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import scipy

from fastflow_jax.data.dataset import Regions
from fastflow_jax.errors import InputError
from fastflow_jax.evaluation.metrics import regions_of
from fastflow_jax.evaluation.ranking import check, figures

_PENDING = 1 << 20  # normal pixels collected before the highest are selected
_SIZES = (0.0001, 0.001, 0.01, 0.1)  # of regions, as shares of the image


def aupimo(
    maps: np.ndarray,
    masks: np.ndarray,
    labels: np.ndarray,
    *,
    valid: np.ndarray | None = None,
    fpr_bounds: tuple[float, float] = (1e-5, 1e-4),
) -> np.ndarray | None:
    """Area under the per-image overlap curve of each defective image.

    The recall of an image at a threshold is the share of its defective pixels with a value of at
    least the threshold. A threshold is identified by the false-positive rate of normal images
    alone: the share of pixels that reach it, averaged over these images. The recall is averaged
    over the logarithm of this rate between the bounds, at the lowest threshold whose rate is at
    most the given one. A defective pixel with a value that normal images reach at a rate r thus
    contributes log(upper / max(r, lower)) / log(upper / lower), or 0 if r is above the upper bound.
    Bounds below one pixel of all normal images mean values above all of these.

    Source: Bertoldo et al., AUPIMO, BMVC 2024 (arXiv 2401.01984).

    Args:
      maps: anomaly maps [N, H, W].
      masks: bool [N, H, W], True in defects.
      labels: [N], 1 or True for defective images.
      valid: bool [N, H, W], False in padded pixels, or None if there is no padding.
      fpr_bounds: lower and upper bound, 0 < lower < upper <= 1, else InputError is raised.

    Returns:
      float64 [N], from 0 to 1, NaN for images without defective pixels; None without normal images.
    """
    lower, upper = fpr_bounds
    if not 0 < lower < upper <= 1:
        raise InputError(f"fpr_bounds is {fpr_bounds}. It must be 0 < lower < upper <= 1.")
    maps, masks = check(maps, masks)
    labels = np.asarray(labels).astype(bool)
    normal = np.flatnonzero(~labels)
    if not len(normal):
        return None
    values, shares = _highest(maps, normal, valid, upper)
    # Share of normal pixels from each value up, and 0 above the highest one.
    rates = np.append(np.cumsum(shares[::-1])[::-1], 0)
    areas = np.full(len(maps), np.nan)
    for i in np.flatnonzero(labels):
        if masks[i].any():
            rate = np.maximum(rates[np.searchsorted(values, maps[i][masks[i]], "left")], lower)
            areas[i] = np.maximum(np.log(upper / rate), 0).mean() / np.log(upper / lower)
    return areas


def _highest(
    maps: np.ndarray, rows: np.ndarray, valid: np.ndarray | None, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Highest values of images, ascending, and the share of all pixels that each stands for.

    Together they are just above the given share, or all pixels.
    """
    values: np.ndarray = np.empty(0, maps.dtype)
    shares: np.ndarray = np.empty(0)
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    for i in rows:
        image = maps[i].reshape(-1) if valid is None else maps[i][valid[i]]
        low = values[0] if shares.sum() > share else -np.inf
        high = image[image >= low]
        waiting.append((high, np.full(len(high), 1 / (max(1, len(image)) * len(rows)))))
        if sum(len(v) for v, _ in waiting) >= _PENDING or i == rows[-1]:
            values = np.concatenate([values, *(v for v, _ in waiting)])
            shares = np.concatenate([shares, *(s for _, s in waiting)])
            order = np.argsort(values)
            values, shares = values[order], shares[order]
            above = np.cumsum(shares[::-1])[::-1]
            kept = max(0, int((above > share).sum()) - 1)
            values, shares, waiting = values[kept:], shares[kept:], []
    return values, shares


def saturated_weights(anomaly_map: np.ndarray, mask: np.ndarray, regions: Regions) -> np.ndarray:
    """Contribution of each defective pixel of an image to the saturated overlap, float64 [p].

    In a region of n pixels, of which a share s suffices, those with the s n highest values
    contribute 1 / (s n) each and the others nothing. A pixel of several regions contributes to
    each of them.

    Args:
      anomaly_map: [H, W].
      mask: bool [H, W]; parts of regions outside are ignored.
      regions: of the image.
    """
    weights = np.zeros(anomaly_map.shape)
    for region, share in zip(*regions, strict=True):
        region = region & mask
        values = anomaly_map[region]
        rank = np.empty(len(values))  # 0 for the highest value
        rank[np.argsort(-values)] = np.arange(len(values))
        enough = share * len(values)
        weights[region] += np.clip(enough - rank, 0, 1) / enough
    return weights[mask]


def au_spro(
    maps: np.ndarray,
    masks: np.ndarray,
    regions: Callable[[int], Regions],
    fpr_limits: Sequence[float] = (0.05,),
    *,
    valid: np.ndarray | None = None,
    rows: Sequence[int] | np.ndarray | None = None,
) -> list[float] | None:
    """Areas under the curve of saturated region overlap, as in MVTec LOCO.

    The overlap of a region at a threshold is min(pixels that reach it / saturation, 1), averaged
    over the regions of all images. It saturates where finding a part of a region is enough, for
    example one of two places where an object is missing. The curve over the false-positive rate of
    all normal pixels is integrated as in `metrics.aupro`, which it equals if all shares are 1.

    Source: Bergmann et al., Beyond Dents and Scratches, IJCV 130 (2022), equation 1.

    Args:
      maps: anomaly maps [N, H, W].
      masks: bool [N, H, W], True in defects. Parts of regions outside are ignored.
      regions: returns the regions of an image, given its index. They may overlap and need not be
        connected. An image is read several times, so that regions need not fit in memory.
      fpr_limits: each above 0 and at most 1.
      valid: bool [N, H, W], False in padded pixels, or None if there is no padding.
      rows: indices of the images that count; None: all.

    Returns:
      An area for each limit; None without regions or normal pixels.

    Raises:
      InputError: a region has a share that is not above 0 and at most 1.
    """

    def weigh(i: int) -> np.ndarray:
        found = regions(i)
        if not ((found.saturation > 0) & (found.saturation <= 1)).all():
            raise InputError(
                f"Image {i} has regions with the saturation {found.saturation.tolist()}. Shares "
                "must be above 0 and at most 1."
            )
        return saturated_weights(maps[i], masks[i], found)

    weights = {"spro": weigh}
    found = figures(maps, masks, valid=valid, weights=weights, fpr_limits=fpr_limits, rows=rows)
    return found and found.areas["spro"]


def segmentation_f1(
    maps: np.ndarray,
    masks: np.ndarray,
    threshold: float,
    *,
    valid: np.ndarray | None = None,
) -> float | None:
    """F1 of the pixels above a threshold, over all images together; None without defects.

    Args:
      maps: anomaly maps [N, H, W].
      masks: bool [N, H, W], True in defects.
      threshold: pixels with a higher value count as defective. In the protocol of MVTec AD 2 it
        comes from normal images, as that of `thresholds.pixel_threshold` does.
      valid: bool [N, H, W], False in padded pixels, or None if there is no padding.
    """
    hit = called = 0
    for i, mask in enumerate(masks):
        above = maps[i] > threshold
        hit += int((above & mask).sum())
        called += int((above if valid is None else above & valid[i]).sum())
    defective = int(masks.sum())
    return 2 * hit / (called + defective) if defective else None


@dataclasses.dataclass(frozen=True)
class SizeRecall:
    """Regions of similar size, and how many a threshold finds."""

    low: float  # size as a share of the image, at least
    high: float  # and below
    regions: int  # number of regions of this size
    found: int  # regions with at least one pixel above the threshold
    interval: list[float]  # of the share found, 95 % (Clopper & Pearson, 1934)
    overlap: float  # mean share of a region's pixels above the threshold


def recall_by_size(
    maps: np.ndarray,
    masks: np.ndarray,
    threshold: float,
    *,
    regions: Callable[[int], Regions] | None = None,
    valid: np.ndarray | None = None,
) -> list[SizeRecall]:
    """Computes the share of regions that a threshold finds, for regions of similar size.

    Sizes are in decades of the share of the image, from below 0.01 % to above 10 %. Decades without
    regions are left out.

    Args:
      maps: anomaly maps [N, H, W].
      masks: bool [N, H, W], True in defects.
      threshold: see `segmentation_f1`.
      regions: see `au_spro`; None for the 8-connected components of the masks.
      valid: bool [N, H, W], False in padded pixels, which do not belong to the image.
    """
    sizes: list[float] = []
    overlaps: list[float] = []
    for i in np.flatnonzero([mask.any() for mask in masks]).tolist():
        image = masks[i].size if valid is None else int(valid[i].sum())
        for values in _values_of_regions(maps[i], masks[i], regions and regions(i)):
            sizes.append(len(values) / image)
            overlaps.append(float((values > threshold).mean()))
    decade = np.searchsorted(_SIZES, sizes, "right")
    of_regions = np.array(overlaps)
    edges = (0.0, *_SIZES, 1.0)
    return [
        _size_recall(edges[i], edges[i + 1], of_regions[decade == i])
        for i in np.unique(decade).tolist()
    ]


def _values_of_regions(
    anomaly_map: np.ndarray, mask: np.ndarray, regions: Regions | None
) -> list[np.ndarray]:
    """Values of the anomaly map in each region; without regions, in each component of the mask."""
    if regions is not None:
        return [anomaly_map[region] for region in regions.masks]
    numbers = regions_of(mask)[mask]
    order = np.argsort(numbers, kind="stable")
    ends = np.cumsum(np.bincount(numbers)[1:])
    return np.split(anomaly_map[mask][order], ends[:-1])


def _size_recall(low: float, high: float, overlaps: np.ndarray) -> SizeRecall:
    n, found = len(overlaps), int((overlaps > 0).sum())
    start = float(scipy.special.betaincinv(found, n - found + 1, 0.025)) if found else 0.0
    end = float(scipy.special.betaincinv(found + 1, n - found, 0.975)) if found < n else 1.0
    return SizeRecall(low, high, n, found, [start, end], float(overlaps.mean()))
