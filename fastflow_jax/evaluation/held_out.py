"""What held-out normal images look like to a trained detector: all that thresholds come from."""

import dataclasses
import pathlib

import numpy as np

from fastflow_jax.detectors.base import CalibratedScorer
from fastflow_jax.evaluation import thresholds
from fastflow_jax.evaluation.thresholds import Threshold
from fastflow_jax.features.extract import Features, in_batches
from fastflow_jax.files import read_arrays, write_arrays

_FOLDS = 5


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Of n held-out normal images."""

    scores: np.ndarray  # float32 [n]
    tails: np.ndarray  # [n, Q], see `thresholds.tails`; of maps of the input's size
    # int [n], equal for images of the same part; None: each image shows another part.
    groups: np.ndarray | None = None

    @property
    def n_parts(self) -> int:
        """The number of parts that the images show: what thresholds can be promised from."""
        return len(self.scores) if self.groups is None else len(np.unique(self.groups))

    def image_threshold(self, rate: float) -> Threshold:
        """See `thresholds.image_threshold`."""
        return thresholds.image_threshold(self.scores, rate, groups=self.groups)

    def pixel_threshold(self, rate: float, *, warn: bool = True) -> Threshold:
        """See `thresholds.pixel_threshold`."""
        return thresholds.pixel_threshold(self.tails, rate, groups=self.groups, warn=warn)

    def p_value(self, score: float) -> float:
        """See `thresholds.p_values`."""
        return float(thresholds.p_values(score, self.scores, self.groups))

    def save(self, file: pathlib.Path) -> None:
        """Write what `load` reads."""
        arrays = {"scores": self.scores, "tails": self.tails}
        if self.groups is not None:
            arrays["groups"] = self.groups
        write_arrays(file, arrays)

    @classmethod
    def load(cls, file: pathlib.Path) -> "HeldOut":
        """What `save` wrote."""
        arrays = read_arrays(file)
        return cls(arrays["scores"], arrays["tails"], arrays.get("groups"))


def look_at(
    config,
    scorer,
    holdout: Features,
    valid: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> HeldOut:
    """Score held-out images as if they were new ones.

    A detector that is calibrated by held-out images would find each of them a little more normal
    than a new one, which had no say. So they are cross-fitted: those of each fifth are scored
    under a calibration by the others; images of one group are in the same fifth. New images are
    scored under that by all, so that what is promised of them holds up to a difference of the order
    of 1 / n.

    Args:
      config: filled, that it was trained with.
      scorer: of the detector.
      holdout: features of the images, [n, h, w, C] a scale.
      valid: bool [n, H, W], False in padding; None without padding.
      groups: int [n], see `HeldOut`.
    """
    n, size = len(holdout[0]), config.batch_size
    part = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    is_calibrated = part.max() > 0 and isinstance(scorer, CalibratedScorer)
    fold = part % (_FOLDS if is_calibrated else 1)
    scores, tails = np.empty(n, np.float32), np.empty((n, len(thresholds.EXCEEDANCES)))

    def score_rows(rows, score):
        for batch in (rows[i : i + size] for i in range(0, len(rows), size)):
            scores[batch], maps = score(batch)
            tails[batch] = thresholds.tails(maps, None if valid is None else valid[batch])

    if is_calibrated:
        maps = in_batches(lambda rows: scorer.location_maps(*rows), (holdout, valid), size)
        for i in np.unique(fold):
            fair = scorer.recalibrated(tuple(m[fold != i] for m in maps))
            score_rows(
                np.flatnonzero(fold == i), lambda b, f=fair: f.score_maps(tuple(m[b] for m in maps))
            )
    else:
        score_rows(np.arange(n), lambda b: scorer.score(*_rows(b, holdout, valid)))
    return HeldOut(scores, tails, groups)


def _rows(rows: np.ndarray, features: Features, valid: np.ndarray | None):
    return tuple(m[rows] for m in features), None if valid is None else valid[rows]
