"""Scores of the test images of a detector, and their metrics."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from fastflow_jax.evaluation import metrics
from fastflow_jax.features.extract import FeatureBatch

# Called with images [B, H, W, 3], or the features that a detector takes instead, and, if there is
# padding, the padding mask [B, H, W]. Returns image scores [B] and anomaly maps [B, H, W].
Score = Callable[..., tuple[np.ndarray, np.ndarray]]

# `aupro` is the area up to a false-positive rate of .3, `aupro_05` up to .05.
METRICS = ("image_auroc", "pixel_auroc", "aupro", "aupro_05", "image_f1", "image_ap", "pixel_ap")


class Scored(NamedTuple):
    """Scores of N images, in the order of the source; higher is more anomalous.

    Anomaly maps are kept only if there are masks: they are large and serve pixel metrics alone.
    """

    scores: np.ndarray  # float32 [N]
    labels: np.ndarray  # int32 [N], 1 for defective images
    maps: np.ndarray | None  # float32 [N, H, W]; None without masks
    masks: np.ndarray | None  # bool [N, H, W], True in defects; None without masks
    valid: np.ndarray | None  # bool [N, H, W], False in padded pixels; None without padding


def score_split(score: Score, batches: Iterable[FeatureBatch], n: int, *, progress: str) -> Scored:
    """Scores each image of a split once.

    Args:
      score: scores one batch.
      batches: at least one.
      n: number of images, for the progress bar.
      progress: label of the progress bar.
    """
    parts = []
    with tqdm(total=n, desc=progress, unit="img", leave=False, dynamic_ncols=True) as bar:
        for batch in batches:
            padding = () if batch.valid is None else (batch.valid,)
            scores, maps = score(batch.features, *padding)
            maps = None if batch.mask is None else maps
            parts.append((scores, batch.label, maps, batch.mask, batch.valid))
            bar.update(len(batch.label))
    fields = zip(*parts, strict=True)
    joined: list[Any] = [None if f[0] is None else np.concatenate(f) for f in fields]
    return Scored(*joined)


def measure(scored: Scored) -> dict[str, float | None]:
    """Computes `METRICS`; None for a metric that needs masks or a class that the data lack."""
    image = scored.scores, scored.labels
    figures = {
        "image_auroc": metrics.image_auroc(*image),
        "image_f1": metrics.f1_max(*image)[0],
        "image_ap": metrics.average_precision(*image),
    }
    maps, masks, valid = scored.maps, scored.masks, scored.valid
    if maps is not None and masks is not None:
        pixels = (maps, masks) if valid is None else (maps[valid], masks[valid])
        figures["pixel_auroc"] = metrics.pixel_auroc(*pixels)
        figures["pixel_ap"] = metrics.average_precision(*pixels)
        areas = metrics.aupros(maps, masks, (0.3, 0.05), valid=valid)
        figures["aupro"], figures["aupro_05"] = areas or (None, None)
    return {metric: figures.get(metric) for metric in METRICS}
