"""Metrics of resampled test images, from scores and counts of pixels instead of anomaly maps.

An image is reduced to its score and to three histograms of its anomaly map: of normal pixels, of
defective pixels, and of defective pixels weighted by region (`metrics.region_weights`). A metric of
any resample of the images follows from weighted sums of these. Bins are narrow where metrics need
it: at high quantiles of normal pixels and at all quantiles of defective ones. Within a bin scores
count as evenly spread; the error is below .002 (`tests/benchmarks/test_resampled.py`).
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from fastflow_jax.evaluation.evaluate import Scored
from fastflow_jax.evaluation.metrics import region_weights

METRICS = ("image_auroc", "pixel_auroc", "aupro", "aupro_05", "pixel_ap")
_BINS = 500  # for each class of pixels
_SAMPLE = 1 << 21  # largest number of pixels of a class that the bins are chosen from
_LIMITS = {"aupro": 0.3, "aupro_05": 0.05}

Counts = Mapping[str, np.ndarray]


def count(scored: Scored) -> dict[str, np.ndarray]:
    """Reduces scored images to what `measure` needs.

    Returns:
      scores: float32 [N].
      labels: int32 [N].
      normal, defective: uint32 [N, K], pixels of each image by score; without masks, or with masks
        of one class, there are none.
      overlap: float32 [N, K], `region_weights` of the defective pixels.
    """
    counts = {"scores": scored.scores, "labels": scored.labels}
    maps, masks, valid = scored.maps, scored.masks, scored.valid
    if maps is None or masks is None:
        return counts
    good = ~masks if valid is None else valid & ~masks
    if not masks.any() or not good.any():
        return counts
    ranks = np.linspace(0, 1, _BINS)
    edges = []
    for pixels, quantiles in ((maps[good], 1 - ranks**2), (maps[masks], ranks)):
        edges.append(np.quantile(pixels[:: 1 + len(pixels) // _SAMPLE], quantiles))
    edges = np.unique(np.concatenate(edges).astype(maps.dtype))
    weights, start, rows = region_weights(masks), 0, []
    for anomaly_map, mask, normal in zip(maps, masks, good, strict=True):
        places = np.searchsorted(edges, anomaly_map, "right")
        inside = weights[start : start + mask.sum()]
        start += len(inside)
        parts = (places[normal], None), (places[mask], None), (places[mask], inside)
        rows.append([np.bincount(place, w, len(edges) + 1) for place, w in parts])
    names = {"normal": np.uint32, "defective": np.uint32, "overlap": np.float32}
    histograms = zip(names.items(), zip(*rows, strict=True), strict=True)
    return counts | {name: np.stack(each).astype(dtype) for (name, dtype), each in histograms}


def resamples(labels: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Multiplicities of images in n resamples, float32 [n, N].

    The first has each image once. The others are drawn with replacement among the good and among
    the defective images, so that the numbers of both stay the same.
    """
    rng, weights = np.random.default_rng(seed), np.ones((n, len(labels)), np.float32)
    for label in np.unique(labels):
        size = int((labels == label).sum())
        weights[1:, labels == label] = rng.multinomial(size, np.full(size, 1 / size), n - 1)
    return weights


def measure(counts: Counts, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Computes the `METRICS` that the data allow, for each resample.

    Args:
      counts: of N images, from `count`.
      weights: multiplicities of the images, float32 [n, N].

    Returns:
      float64 [n] by metric.
    """
    figures, labels = {}, counts["labels"].astype(bool)
    if labels.any() and not labels.all():
        figures["image_auroc"] = _image_auroc(counts["scores"], labels, weights)
    if "normal" not in counts:
        return figures
    # [n, K + 1], number of pixels at or above each edge, from the highest score down
    false, true, overlap = (
        np.pad((weights @ counts[name].astype(np.float32))[:, ::-1], ((0, 0), (1, 0)))
        .astype(np.float64)
        .cumsum(1)
        for name in ("normal", "defective", "overlap")
    )
    middle_true, middle_false = ((v[:, 1:] + v[:, :-1]) / 2 for v in (true, false))
    found = np.maximum(middle_true + middle_false, np.finfo(np.float64).tiny)
    steps = np.diff(true) / true[:, -1:]
    figures["pixel_auroc"] = (steps * (1 - middle_false / false[:, -1:])).sum(1)
    figures["pixel_ap"] = (steps * middle_true / found).sum(1)
    rate, steps = false / false[:, -1:], np.diff(overlap) / overlap[:, -1:]
    for metric, limit in _LIMITS.items():
        start, end = rate[:, :-1], rate[:, 1:]
        ramp = np.clip(limit - start, 0, end - start)  # the part of the bin within the limit
        share = np.divide(ramp, end - start, out=np.ones_like(ramp), where=end > start)
        area = share * ramp / 2 + np.maximum(limit - end, 0)
        figures[metric] = (steps * area).sum(1) / limit
    return figures


def _image_auroc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    defective, good = scores[labels][:, None], scores[~labels]
    wins = (defective > good) + (defective == good) / 2  # [defective, good]
    pairs = ((weights[:, labels] @ wins) * weights[:, ~labels]).sum(1, dtype=np.float64)
    return pairs / (labels.sum() * (~labels).sum())


def over_images(difference: np.ndarray) -> list[float]:
    """Difference, and the ends of its 95 % interval over images.

    Args:
      difference: of a metric in each resample, [n]; the first is that of the data.
    """
    return [float(v) for v in (difference[0], *np.percentile(difference[1:], (2.5, 97.5)))]


def over_sets(differences: Sequence[np.ndarray], seed: int) -> list[float]:
    """Mean difference over sets, and the ends of its 95 % interval over sets and images.

    Each resample draws as many sets as there are, with replacement, and a resample of the images of
    each drawn set.

    Args:
      differences: for each set, of a metric in each resample, [n]; the first is that of the data.
      seed: of the draws.
    """
    table, rng = np.stack(differences), np.random.default_rng(seed)
    size = (table.shape[1] - 1, len(table))
    drawn = table[rng.integers(len(table), size=size), rng.integers(1, table.shape[1], size=size)]
    return over_images(np.concatenate([[table[:, 0].mean()], drawn.mean(1)]))


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Mean rank of each column over rows, 1 for the highest value; equal values share a rank."""
    return stats.rankdata(-values, axis=1).mean(0)
