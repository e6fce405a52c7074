"""Scores of held-out normal images, the source of thresholds and p-values."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from fastflow_jax.data.tiles import Tiles
from fastflow_jax.data.tiling import Places
from fastflow_jax.decision import Threshold, p_values
from fastflow_jax.detectors.base import CalibratedScorer
from fastflow_jax.evaluation import thresholds
from fastflow_jax.features.extract import Features, in_batches
from fastflow_jax.files import read_arrays, write_arrays
from fastflow_jax.state import Slot, State, check

_FOLDS = 5
Reweigh = Callable[[Any, tuple[np.ndarray, ...]], Any]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Scores of n held-out normal images, or upper bounds of them: see `teaching`."""

    scores: np.ndarray  # float32 [n]
    tails: np.ndarray  # [n, Q], quantiles of their anomaly maps, see `thresholds.tails`
    # int [n], equal for images of the same part; None if each image shows another part.
    groups: np.ndarray | None = None
    # int [n], equal for images of the same kind: 0 for those of the training, higher for images
    # that were taught later. None if there is one kind.
    kinds: np.ndarray | None = None
    # `Places.table` of these images, if their tiles are standardised; else None.
    places: np.ndarray | None = None

    @classmethod
    def empty(cls, n: int, groups: np.ndarray | None) -> "HeldOut":
        """Scores of n images, to `fill`."""
        tails = np.empty((n, len(thresholds.EXCEEDANCES)))
        return cls(np.empty(n, np.float32), tails, groups)

    def fill(
        self,
        score: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
        rows: np.ndarray,
        size: int,
        valid: np.ndarray | None,
        tiles: Tiles | None,
        statistics: Places | None = None,
    ) -> None:
        """Sets the scores of some images.

        Args:
          score: function of rows [b] to scores [b] and anomaly maps [b, H, W].
          rows: int [M], of the images, or of all of their tiles.
          size: largest number of rows that are scored together.
          valid: bool [N, H, W], False in padded pixels, or None if there is no padding.
          tiles: of the images, if the rows are tiles.
          statistics: see `Tiles.whole`.
        """
        batches = _batches(rows, size)
        if tiles is None:
            for batch in batches:
                self.scores[batch], maps = score(batch)
                seen = None if valid is None else valid[batch]
                self.tails[batch] = thresholds.tails(maps, seen)
            return
        for whole in tiles.whole(rows, map(score, batches), statistics):
            self.scores[whole.index] = whole.score
            self.tails[whole.index] = thresholds.tails(whole.anomaly_map[None])[0]

    @property
    def n_parts(self) -> int:
        """Number of different parts in the images, the sample size of thresholds."""
        return len(self.scores) if self.groups is None else len(np.unique(self.groups))

    def image_threshold(self, rate: float) -> Threshold:
        """Returns the threshold of image scores for a false-alarm rate.

        With several kinds it is the highest of their thresholds, so that the rate holds for each.
        """
        return thresholds.image_threshold(self.scores, rate, groups=self.groups, kinds=self.kinds)

    def pixel_threshold(self, rate: float, *, warn: bool = True) -> Threshold:
        """Returns the threshold of anomaly maps for a false-alarm rate of pixels, likewise."""
        return thresholds.pixel_threshold(
            self.tails, rate, groups=self.groups, kinds=self.kinds, warn=warn
        )

    def with_kind(self, other: "HeldOut") -> "HeldOut":
        """Adds images of a new kind, whose parts are others than those of this object."""
        kinds = np.zeros(len(self.scores), int) if self.kinds is None else self.kinds
        groups = None
        if self.groups is not None or other.groups is not None:
            old, new = (
                np.arange(len(each.scores)) if each.groups is None else each.groups
                for each in (self, other)
            )
            groups = np.concatenate([old, new - new.min() + old.max() + 1])
        return HeldOut(
            np.concatenate([self.scores, other.scores]),
            np.concatenate([self.tails, other.tails]),
            groups,
            np.concatenate([kinds, np.full(len(other.scores), kinds.max() + 1)]),
        )

    def typical_levels(self, *shares: float) -> list[float]:
        """Values that these shares of a map's pixels reach, averaged over the images."""
        typical = self.tails.mean(0)  # falls with the share of pixels
        return [float(np.interp(-s, -thresholds.EXCEEDANCES, typical)) for s in shares]

    def p_value(self, score: float) -> float:
        """Returns the p-value of an image score, see `decision.p_values`."""
        return float(p_values(score, self.scores, self.groups, self.kinds))

    def state_dict(self) -> dict[str, np.ndarray]:
        """The arrays by name, for `from_state`."""
        return {name: array for name, array in vars(self).items() if array is not None}

    @classmethod
    def from_state(cls, state: State) -> "HeldOut":
        """The inverse of `state_dict`; raises InputError if it has other arrays."""
        n = len(state.get("scores", ())) or None
        slots = {"scores": Slot((n,)), "tails": Slot((n, len(thresholds.EXCEEDANCES)))}
        for name in ("groups", "kinds"):
            if name in state:
                slots[name] = Slot((n,), np.integer)
        if "places" in state:
            slots["places"] = Slot((None, 6), np.floating)
        check(state, slots)
        return cls(**{name: np.asarray(array) for name, array in state.items()})

    def save(self, file: pathlib.Path) -> None:
        """Writes an .npz file for `load`."""
        write_arrays(file, self.state_dict())

    @classmethod
    def load(cls, file: pathlib.Path) -> "HeldOut":
        """Reads a file of `save`, also of older versions; raises InputError if it is damaged."""
        names, arrays = [field.name for field in dataclasses.fields(cls)], read_arrays(file)
        return cls.from_state({name: arrays[name] for name in names if name in arrays})


def score_held_out(
    config,
    scorer,
    holdout: Features,
    valid: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    reweigh: Reweigh | None = None,
    tiles: Tiles | None = None,
) -> HeldOut:
    """Scores held-out images as new images would be scored.

    A scorer that is calibrated with held-out images gives them slightly lower scores than new
    images. Such scorers are cross-fitted: each fifth of the images is scored with a calibration
    from the other four, and images of one group are in the same fifth. New images are scored with
    the calibration from all held-out images, so their false-alarm rate differs from the stated one
    by an amount of order 1 / n.

    Args:
      config: the filled configuration of the training.
      scorer: the trained scorer. A `CalibratedScorer` is cross-fitted.
      holdout: features of the images, [n, h, w, C] per scale.
      valid: bool [n, H, W], False in padded pixels, or None if there is no padding.
      groups: int, one of each image, equal for images of the same part, or None if each shows
        another part.
      reweigh: see `score_location_maps`.
      tiles: tiles of the held-out images, if the features are those of tiles. The scores are those
        of whole images.
    """
    size = config.batch_size
    if isinstance(scorer, CalibratedScorer):
        maps = in_batches(lambda part: scorer.location_maps(*part), (holdout, valid), size)
        return score_location_maps(scorer, maps, valid, groups, reweigh, tiles)

    n = len(holdout[0]) if tiles is None else len(tiles.sizes)
    found, rows = HeldOut.empty(n, groups), np.arange(len(holdout[0]))

    def score(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        padding = None if valid is None else valid[rows]
        return scorer.score(tuple(scale[rows] for scale in holdout), padding)

    if tiles is None or not config.data.aligned:
        found.fill(score, rows, size, valid, tiles)
        return found
    return _fill_folds(found, scorer.config, lambda others: score, rows, valid, tiles)


def score_location_maps(
    scorer: CalibratedScorer,
    maps: tuple[np.ndarray, ...],
    valid: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    reweigh: Reweigh | None = None,
    tiles: Tiles | None = None,
) -> HeldOut:
    """Scores the held-out images that a scorer is calibrated on, cross-fitted.

    Args:
      scorer: the calibrated scorer.
      maps: `CalibratedScorer.location_maps` of the images, [n, h, w] per map.
      valid: see `score_held_out`.
      groups: see `score_held_out`.
      reweigh: function from a scorer and location maps of normal images to a scorer, which learns
        weights from them, see `labelled.Defects`; None if weights are not learned.
      tiles: see `score_held_out`.
    """
    found = HeldOut.empty(len(maps[0]) if tiles is None else len(tiles.sizes), groups)

    def fitted(others: np.ndarray) -> Callable:
        """The function from rows to scores and maps, calibrated on other rows."""
        given, seen = tuple(m[others] for m in maps), None if valid is None else valid[others]
        chosen = scorer.recalibrated(given, seen) if len(others) else scorer
        if reweigh is not None and len(others):
            chosen = reweigh(chosen, given)

        def score(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            own = tuple(m[rows] for m in maps)
            return chosen.score_maps(own, None if valid is None else valid[rows])

        return score

    return _fill_folds(found, scorer.config, fitted, np.arange(len(maps[0])), valid, tiles)


def _fill_folds(
    found: HeldOut,
    config,
    fitted: Callable[[np.ndarray], Callable],
    rows: np.ndarray,
    valid: np.ndarray | None,
    tiles: Tiles | None,
) -> HeldOut:
    """Scores each fifth of the images with what is known from the others.

    Args:
      found: to fill.
      config: filled.
      fitted: function from the rows of the others to `HeldOut.fill`'s function.
      rows: all rows, of the images or their tiles.
      valid: see `score_held_out`.
      tiles: see `score_held_out`.
    """
    n, size, groups = len(found.scores), config.batch_size, found.groups
    part = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    fold = part % _FOLDS
    fold = fold if tiles is None else fold[tiles.image]

    aligned = tiles if config.data.aligned else None
    for i in np.unique(fold):
        score, others, statistics = fitted(rows[fold != i]), rows[fold != i], None
        if aligned is not None:
            statistics = aligned.statistics(others, map(score, _batches(others, size)))
        found.fill(score, rows[fold == i], size, valid, tiles, statistics)
    if aligned is None:
        return found
    statistics = aligned.statistics(rows, map(fitted(rows), _batches(rows, size)))
    return dataclasses.replace(found, places=statistics.table)


def _batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]
