"""Scores a split and measures it: one protocol for every detector."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from fastflow_jax.data.pipeline import Batch
from fastflow_jax.evaluation import metrics

# Images [b, H, W, 3], or what a detector takes in their place, and where there is padding their
# valid pixels [b, H, W] -> scores [b], anomaly maps [b, H, W]; higher is more anomalous.
Score = Callable[..., tuple[np.ndarray, np.ndarray]]

METRICS = ("image_auroc", "pixel_auroc", "aupro", "image_f1", "image_ap", "pixel_ap")


class Scored(NamedTuple):
    """A split, scored; N images in the order of the source."""

    scores: np.ndarray  # float32 [N]
    labels: np.ndarray  # int32 [N], 1 defective
    # Where there are masks: nothing else is measured on maps, and those of many images are large.
    maps: np.ndarray | None  # float32 [N, H, W]
    masks: np.ndarray | None  # bool [N, H, W]
    valid: np.ndarray | None  # bool [N, H, W], false in padding; None without padding


def score_split(score: Score, batches: Iterable[Batch], n: int, *, progress: str) -> Scored:
    """Score every image once, with a progress bar of that label."""
    scores, maps, labels, masks, valids = [], [], [], [], []
    with tqdm(total=n, desc=progress, unit="img", leave=False, dynamic_ncols=True) as bar:
        for batch in batches:
            padding = () if batch.valid is None else (batch.valid,)
            image_scores, anomaly_maps = score(batch.image, *padding)
            scores.append(image_scores)
            labels.append(batch.label)
            masks.append(batch.mask)
            valids.append(batch.valid)
            maps.append(None if batch.mask is None else anomaly_maps)
            bar.update(len(batch.label))

    def joined(parts):
        return None if parts[0] is None else np.concatenate(parts)

    return Scored(*map(joined, (scores, labels, maps, masks, valids)))


def measure(scored: Scored) -> dict[str, float | None]:
    """The figures of `METRICS` on raw scores; None where the data cannot give one."""
    image = (scored.scores, scored.labels)
    pixel = pixels = (scored.maps, scored.masks)
    if scored.masks is not None and scored.valid is not None:
        pixels = (scored.maps[scored.valid], scored.masks[scored.valid])
    return {
        "image_auroc": metrics.image_auroc(*image),
        "pixel_auroc": metrics.pixel_auroc(*pixels),
        "aupro": metrics.aupro(*pixel, valid=scored.valid),
        "image_f1": metrics.f1_max(*image)[0],
        "image_ap": metrics.average_precision(*image),
        "pixel_ap": metrics.average_precision(*pixels),
    }
