"""Scores a split and measures it: one protocol for every detector."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from fastflow_jax import metrics
from fastflow_jax.data.pipeline import Batch

# (images [b, H, W, 3]) -> image scores [b], anomaly maps [b, H, W]; higher is more anomalous.
Score = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

METRICS = ("image_auroc", "pixel_auroc", "aupro", "image_f1", "image_ap", "pixel_ap")


class Scored(NamedTuple):
    """A split, scored; N images in the order of the source."""

    scores: np.ndarray  # float32 [N]
    maps: np.ndarray  # float32 [N, H, W]
    labels: np.ndarray  # int32 [N], 1 defective
    masks: np.ndarray | None  # bool [N, H, W]


def score_split(score: Score, batches: Iterable[Batch], n: int, *, progress: str) -> Scored:
    """Score every image once, with a progress bar of that label."""
    scores, maps, labels, masks = [], [], [], []
    with tqdm(total=n, desc=progress, unit="img", leave=False, dynamic_ncols=True) as bar:
        for batch in batches:
            image_scores, anomaly_maps = score(batch.image)
            scores.append(image_scores)
            maps.append(anomaly_maps)
            labels.append(batch.label)
            masks.append(batch.mask)
            bar.update(len(batch.label))
    return Scored(
        np.concatenate(scores),
        np.concatenate(maps),
        np.concatenate(labels),
        None if masks[0] is None else np.concatenate(masks),
    )


def measure(scored: Scored) -> dict[str, float | None]:
    """The figures of `METRICS` on raw scores; None where the data cannot give one."""
    image = (scored.scores, scored.labels)
    pixel = (scored.maps, scored.masks)
    return {
        "image_auroc": metrics.image_auroc(*image),
        "pixel_auroc": metrics.pixel_auroc(*pixel),
        "aupro": metrics.aupro(*pixel),
        "image_f1": metrics.f1_max(*image)[0],
        "image_ap": metrics.average_precision(*image),
        "pixel_ap": metrics.average_precision(*pixel),
    }
