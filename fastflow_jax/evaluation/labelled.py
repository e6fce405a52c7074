"""Weights of the maps in the image score, learned from a few labelled defects.

The image score is a weighted mean over maps, see `detectors.calibration`. The weights are those of
a logistic regression on pairs of a defective and a held-out normal image, non-negative and
regularised towards the default ones: about ten numbers, which a few defects can support. They are
used only if they raise the image AUROC of images that they were not learned from by more than its
standard error explains. Anomaly maps do not change.
"""

import dataclasses
import logging
from typing import TypeVar

import numpy as np
import scipy

from fastflow_jax.detectors.base import method
from fastflow_jax.detectors.calibration import LocationScorer
from fastflow_jax.errors import InputError

MIN_DEFECTS = 5
_FOLDS = 5
_REPEATS = 5
_STRENGTH = 0.003  # of the regularisation, chosen on the sets of docs/labelled_defects.md
_CONFIDENCE = 0.95

_log = logging.getLogger(__name__)
S = TypeVar("S", bound=LocationScorer)


@dataclasses.dataclass(frozen=True)
class Gain:
    """Difference of image AUROC between learned and default weights, cross-validated."""

    mean: float
    interval: tuple[float, float]  # of 95 %

    @property
    def is_positive(self) -> bool:
        """Whether the interval is above 0."""
        return self.interval[0] > 0


@dataclasses.dataclass(frozen=True)
class Defects:
    """Location maps of images with labelled defects."""

    maps: tuple[np.ndarray, ...]  # `LocationScorer.location_maps`, [D, h, w] per map
    default: np.ndarray  # weights that learned ones are regularised towards, [maps]

    def reweighted(self, scorer: S, normal: tuple[np.ndarray, ...]) -> S:
        """A copy of a scorer with weights learned from the defects and from normal images.

        Args:
          scorer: calibrated.
          normal: location maps of normal images, [N, h, w] per map.
        """
        scores = scorer.window_scores(normal), scorer.window_scores(self.maps)
        return scorer.reweighted(learn(*scores, self.default))


def check(config) -> None:
    """Raises InputError if the image score of a filled configuration cannot learn weights."""
    if config.data.tile is not None:
        raise InputError(
            "A detector of tiles cannot learn from labelled defects, because they are labels of "
            "whole images. Leave the defects or config.data.tile out."
        )
    if "score" not in method(config.detector).reads:
        raise InputError(
            f"The detector {config.detector} cannot learn from defects: its score has no weights "
            "of maps. Fit fastflow, knn, gaussian or subspace, or leave the defects out."
        )
    if config.score.form != "windows":
        raise InputError(
            f"config.score.form is {config.score.form!r}, and defects have no effect on it. Set it "
            "to 'windows', or leave the defects out."
        )


def learn(normal: np.ndarray, defective: np.ndarray, default: np.ndarray) -> np.ndarray:
    """Learns weights of maps.

    Minimises the mean of log(1 + exp(-(d - n) w / s)) over all pairs of a defective image d and a
    normal one n, plus a multiple of |w - w0|^2, over w >= 0. w0 are the default weights, and s is
    the standard deviation of n w0.

    Args:
      normal: window scores of normal images, [N, maps].
      defective: the same of defective images, [D, maps].
      default: [maps], not negative; maps of weight 0 keep it.

    Returns:
      float32 [maps], with the sum of `default`.
    """
    used = default > 0
    start = default[used] / default.sum()
    scale = max(float((normal[:, used] @ start).std()), 1e-9)
    steps = (defective[:, None, used] - normal[None][..., used]).reshape(-1, used.sum()) / scale

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margins, change = steps @ weights, (weights - start) / start.max()
        slopes = steps.T @ np.exp(-np.logaddexp(0, margins)) / len(steps)
        value = np.logaddexp(0, -margins).mean() + _STRENGTH * change @ change
        return value, 2 * _STRENGTH * change / start.max() - slopes

    found = scipy.optimize.minimize(loss, start, jac=True, bounds=[(0, None)] * len(start)).x
    weights = np.zeros(len(default), np.float32)
    weights[used] = found / found.sum() * default.sum() if found.sum() > 0 else default[used]
    return weights


def gain(normal: np.ndarray, defective: np.ndarray, default: np.ndarray, seed: int = 0) -> Gain:
    """Estimates what learned weights gain on other images, by repeated cross-validation.

    In each of five repeats, weights are learned from four fifths of both kinds of images, and the
    left-out defects are compared with the left-out normal images. The interval is that of the mean
    over images of both kinds (DeLong, DeLong & Clarke-Pearson, Biometrics 44, 1988), with the
    t-distribution of the smaller number.

    Args:
      normal: see `learn`, N of at least 2.
      defective: see `learn`, D of at least 2.
      default: see `learn`.
      seed: of the folds.
    """
    rng, counts = np.random.default_rng(seed), (len(normal), len(defective))
    folds = min(_FOLDS, *counts)
    of_normal, of_defective = (np.zeros(n) for n in counts)
    for _ in range(_REPEATS):
        n, d = (rng.permutation(count) % folds for count in counts)
        for i in range(folds):
            weights = learn(normal[n != i], defective[d != i], default)
            left_out = normal[n == i], defective[d == i]
            change = _wins(*left_out, weights) - _wins(*left_out, default)
            of_defective[d == i] += change.mean(1) / _REPEATS
            of_normal[n == i] += change.mean(0) / _REPEATS
    error = np.sqrt(of_normal.var(ddof=1) / counts[0] + of_defective.var(ddof=1) / counts[1])
    mean = float(of_defective.mean())
    half = float(scipy.special.stdtrit(min(counts) - 1, (1 + _CONFIDENCE) / 2) * error)
    return Gain(mean, (mean - half, mean + half))


def _wins(normal: np.ndarray, defective: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """1 where a defective image scores above a normal one, 1/2 where equal, [D, N]."""
    n, d = normal @ weights, (defective @ weights)[:, None]
    return (d > n) + (d == n) / 2


def choose(scorer: LocationScorer, normal: tuple[np.ndarray, ...], defects: Defects) -> bool:
    """Whether learned weights are better than the default ones; logs the reason.

    Args:
      scorer: calibrated on the normal images.
      normal: location maps of held-out normal images, [N, h, w] per map.
      defects: the labelled defects that the weights are learned from.

    Raises:
      InputError: there are too few images of a kind.
    """
    n, d = len(normal[0]), len(defects.maps[0])
    if d < MIN_DEFECTS or n < MIN_DEFECTS:
        raise InputError(
            f"{d} defects and {n} held-out normal images are too few to learn from. Pass at least "
            f"{MIN_DEFECTS} of each; config.data.holdout is the share of normal images held out."
        )
    scores = scorer.window_scores(normal), scorer.window_scores(defects.maps)
    found = gain(*scores, defects.default)
    low, high = found.interval
    verdict = "They are used." if found.is_positive else "They are not used."
    _log.info(
        "%d labelled defects: learned weights change the image AUROC of other images by %+.3f (95 "
        "%%: %+.3f to %+.3f). %s",
        *(d, found.mean, low, high, verdict),
    )
    return found.is_positive
