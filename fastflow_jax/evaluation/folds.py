"""Cross-fitting: scores of training images by detectors that are trained without them.

A substitute for held-out images if there are too few images to hold some out. The images are
divided into folds. For each fold, a detector is trained on the other folds and scores the images of
this one; the final detector is trained on all of them. Its scores of new images are slightly lower
than those, because it knows more images, so p-values and false-alarm rates err on the safe side
(Barber et al., Predictive Inference with the Jackknife+, Annals of Statistics 49, 2021, has the
bounds for the worst case).
"""

import shutil
from typing import cast

import numpy as np

from fastflow_jax import parallel
from fastflow_jax.detectors.base import Scorer, method
from fastflow_jax.detectors.calibration import LocationScorer, save_again
from fastflow_jax.errors import InputError
from fastflow_jax.evaluation import thresholds
from fastflow_jax.evaluation.held_out import HeldOut, score_location_maps
from fastflow_jax.evaluation.labelled import Defects, choose
from fastflow_jax.features.extract import Features, Part, cached_features, in_batches
from fastflow_jax.files import create_folder
from fastflow_jax.training.context import FitContext

_NEVER = 10**9  # epochs between checkpoints; the last epoch always has one


def cross_fit(
    context: FitContext,
    scorer: Scorer,
    n: int,
    groups: np.ndarray | None = None,
    defects: Defects | None = None,
) -> tuple[Scorer, HeldOut | None]:
    """Scores training images by detectors of the other folds, and calibrates a scorer with them.

    Args:
      context: of the training of `scorer`, without held-out images. `config.data.folds` is the
        largest number of folds. Row i + k n of its features has image i in copy k.
      scorer: the detector of all images. A `LocationScorer` is calibrated, and saved again.
      n: number of training images, without their copies.
      groups: int [N], equal for images of the same part, which are in the same fold; N may count
        copies. None if each image shows another part.
      defects: to learn weights of the maps from, see `labelled`.

    Returns:
      The scorer, calibrated; and the scores of the n images, or None if they show a single part.

    Raises:
      InputError: features of the training images are not cached.
    """
    config, part = context.config, np.arange(n)
    if groups is not None:
        part = np.unique(groups[:n], return_inverse=True)[1]
    if context.train.cached is None:
        raise InputError(
            "config.data.folds needs cached features. Set config.augment.copies, or leave "
            "config.augment and config.train.cache at their defaults."
        )
    folds = min(config.data.folds, part.max() + 1)
    if folds < 2:
        return scorer, None
    fold = part % folds
    found = [_score_fold(context, fold == i, i) for i in range(folds)]
    order = np.argsort(np.concatenate([np.flatnonzero(fold == i) for i in range(folds)]))
    parts = [np.concatenate(arrays)[order] for arrays in zip(*found, strict=True)]
    parallel.on_main(lambda: shutil.rmtree(context.directory / "folds", ignore_errors=True))
    known = None if groups is None else part
    if not isinstance(scorer, LocationScorer):
        return scorer, HeldOut(parts[0], parts[1], known)
    maps, valid = tuple(parts), context.train.valid
    seen = None if valid is None else valid[_scored_rows(context, np.ones(n, bool))]
    scorer, reweigh = scorer.recalibrated(maps, seen), None
    if defects is not None and choose(scorer, maps, defects):
        scorer, reweigh = defects.reweighted(scorer, maps), defects.reweighted
    save_again(scorer, context.directory)
    return scorer, score_location_maps(scorer, maps, seen, known, reweigh)


def _score_fold(context: FitContext, left_out: np.ndarray, i: int) -> tuple[np.ndarray, ...]:
    """Trains a detector without some images, bool [n], and scores these.

    Returns:
      Location maps [M, h, w] of each map; or scores [M] and `thresholds.tails`, of a detector
      without location maps.
    """
    config = context.config.copy_and_resolve_references()
    config.checkpoint_every = _NEVER  # a fold is short, and each checkpoint is read back
    times = context.train.n // len(left_out)
    directory = context.directory / "folds" / str(i)
    parallel.on_main(lambda: create_folder(directory))
    fitted = method(config.detector).fit(
        FitContext(
            config=config,
            train=cached_features(*_part(context, np.flatnonzero(np.tile(~left_out, times)))),
            directory=directory,
            seed=context.seed,
            label=f"{context.label}, fold {i + 1}",
        )
    )
    part = _part(context, _scored_rows(context, left_out))

    def score(batch: Part) -> tuple[np.ndarray, ...]:
        if isinstance(fitted, LocationScorer):
            return fitted.location_maps(*batch)
        scores, maps = fitted.score(*batch)
        return scores, thresholds.tails(maps, batch[1])

    return in_batches(score, part, config.batch_size)


def _scored_rows(context: FitContext, chosen: np.ndarray) -> np.ndarray:
    """Rows of chosen images, bool [n], to score: each in its first copy if there are copies."""
    n = len(chosen)
    return np.flatnonzero(chosen) + (n if context.train.n > n else 0)


def _part(context: FitContext, rows: np.ndarray) -> Part:
    maps, valid = cast(Features, context.train.cached), context.train.valid
    return tuple(scale[rows] for scale in maps), None if valid is None else valid[rows]
