"""Image metrics of each kind of defect, with bootstrap intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np

_RESAMPLES = 1000
_BLOCK = 1 << 22  # multiplicities at a time
METRICS = ("image_auroc", "image_ap", "image_f1")


def image_figures(
    scores: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Computes image metrics of resampled images.

    Args:
      scores: [N].
      labels: bool [N], True for defective images; both classes must occur.
      weights: multiplicities of the images in R resamples, [R, N].

    Returns:
      AUROC, average precision and highest F1 by the names in `METRICS`, float64 [R] each.
    """
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # of each group of equal scores
    weights = weights[:, order].astype(np.float64)
    true, false = (
        np.cumsum(np.where(labels[order] == label, weights, 0), 1)[:, last] for label in (1, 0)
    )
    n_true, n_false = true[:, -1:], false[:, -1:]
    steps = np.diff(true, axis=1, prepend=0)
    middle = false - np.diff(false, axis=1, prepend=0) / 2
    found = np.maximum(true + false, 1)  # the first groups may have no images in a resample
    values = (
        (steps * (1 - middle / n_false)).sum(1) / n_true[:, 0],
        (steps * true / found).sum(1) / n_true[:, 0],
        (2 * true / (found + n_true)).max(1),
    )
    return dict(zip(METRICS, values, strict=True))


def resamples(strata: Sequence[str], n: int, seed: int) -> np.ndarray:
    """Multiplicities of images in resamples with replacement, within each stratum, int [n, N]."""
    rng, of_image = np.random.default_rng(seed), np.asarray(strata)
    weights = np.empty((n, len(strata)), np.int64)
    for stratum in np.unique(of_image):
        size = int((of_image == stratum).sum())
        weights[:, of_image == stratum] = rng.multinomial(size, np.full(size, 1 / size), n)
    return weights


def with_intervals(
    scores: np.ndarray, labels: np.ndarray, strata: Sequence[str], *, seed: int = 0
) -> dict[str, dict[str, Any]] | None:
    """Image metrics, and their 95 % percentile intervals of a stratified bootstrap.

    The numbers of images of each kind are those of the data in all of 1,000 resamples (Efron &
    Tibshirani, An Introduction to the Bootstrap, 1993). Intervals of few images are too narrow.

    Args:
      scores: [N].
      labels: [N], 1 or True for defective images.
      strata: kind of each image, for example `Source.defects`.
      seed: of the resamples.

    Returns:
      {"image_auroc": {"value": .., "interval": [low, high]}, ..}; None with images of one class.
    """
    labels = np.asarray(labels).astype(bool)
    if labels.all() or not labels.any():
        return None
    whole = image_figures(scores, labels, np.ones((1, len(scores))))
    size = max(1, _BLOCK // len(scores))
    parts = [
        image_figures(
            scores, labels, resamples(strata, min(size, _RESAMPLES - start), seed + start)
        )
        for start in range(0, _RESAMPLES, size)
    ]
    drawn = {m: np.concatenate([part[m] for part in parts]) for m in METRICS}
    return {
        m: {
            "value": float(whole[m][0]),
            "interval": [float(v) for v in np.percentile(drawn[m], (2.5, 97.5))],
        }
        for m in METRICS
    }


def by_kind(
    scores: np.ndarray,
    labels: np.ndarray,
    kinds: Sequence[str],
    threshold: float | None = None,
) -> list[dict[str, Any]]:
    """Image metrics of each kind of defect against all normal images, and of all kinds.

    Args:
      scores: [N].
      labels: [N], 1 or True for defective images.
      kinds: kind of each image, for example `Source.defects`.
      threshold: of image scores; images above it are found. None: nothing is said of it.

    Returns:
      A row for each kind, in alphabetical order, and one for all of them if there are several:
      `with_intervals`, "kind" (None for all), "images" (their number) and "found" (or None). Empty
      with images of one class.
    """
    labels, of_image = np.asarray(labels).astype(bool), np.asarray(kinds)
    names: list[str | None] = np.unique(of_image[labels]).tolist()
    rows = []
    for name in [*names, *([None] if len(names) > 1 else [])]:
        of_kind = labels if name is None else labels & (of_image == name)
        used = of_kind | ~labels
        found = with_intervals(scores[used], labels[used], of_image[used].tolist())
        if found is not None:
            hits = None if threshold is None else int((scores[of_kind] > threshold).sum())
            rows.append({"kind": name, "images": int(of_kind.sum()), "found": hits, **found})
    return rows
