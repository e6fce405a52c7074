"""One fit: trains a detector on prepared features and records what `Detector.load` reads."""

import functools
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fastflow_jax.data.tiling import Places
from fastflow_jax.detectors.base import Scorer, method
from fastflow_jax.detectors.calibration import LocationScorer, save_again
from fastflow_jax.errors import InputError
from fastflow_jax.evaluation.folds import cross_fit
from fastflow_jax.evaluation.held_out import Reweigh
from fastflow_jax.evaluation.labelled import Defects, choose
from fastflow_jax.features.extract import Features, in_batches
from fastflow_jax.features.prepare import Prepared
from fastflow_jax.features.shift import Reference
from fastflow_jax.files import create_folder
from fastflow_jax.runs import saved
from fastflow_jax.runs.directory import check_same_data
from fastflow_jax.runs.products import Membership
from fastflow_jax.training.context import FitContext


class Fitted(NamedTuple):
    """A trained detector."""

    scorer: Scorer
    thresholds: dict  # plain, as in `results.json`
    reference: Reference | None  # for `shift.find`
    places: Places | None  # statistics of the places of tiles, with `config.data.aligned`
    seconds: float  # that the detector's `fit` took


def fit(
    config,
    prepared: Prepared,
    *,
    seed: int,
    directory: pathlib.Path,
    training: pathlib.Path | None = None,
    scored: pathlib.Path | None = None,
    sibling_runs: tuple[tuple[int, pathlib.Path], ...] = (),
    member: Membership | None = None,
    on_epoch: Callable[[int, Callable[[], Scorer]], dict] = lambda epoch, make_scorer: {},
    start: dict | None = None,
    label: str = "train",
) -> Fitted:
    """Trains a detector, or continues its training, and records it in a directory.

    Args:
      config: filled, see `config.fill`.
      prepared: data, backbone and features.
      seed: of the training.
      directory: of this part of a run; it is created.
      training: directory of the training, if another part with the same training has made it.
      scored: directory of a part whose scorer gives the same scores, whose held-out scores are
        then reused.
      sibling_runs: see `FitContext`.
      member: the place in a model of several products; None for a model of its own.
      on_epoch: see `FitContext`.
      start: see `FitContext`.
      label: of progress bars.

    Raises:
      InputError: the images or the weights are not those that the training began with, there are
        calibration images and `config.data.folds`, or see `Method.fit`.
      Interrupted: SIGTERM or SIGINT was received; the same call continues the training.
    """
    if config.data.folds and prepared.holdout is not None:
        raise InputError(
            f"config.data.folds is {config.data.folds}, but there are calibration images. Set it "
            "to 0, or remove them."
        )
    training = training or directory
    for each in (directory, training, *(sibling for _, sibling in sibling_runs)):
        create_folder(each)
    for each in (training, *(sibling for _, sibling in sibling_runs)):
        check_same_data(each, prepared.contents, prepared.backbone.weights)
    began = time.perf_counter()
    context = FitContext(
        config=config,
        train=prepared.train,
        directory=training,
        seed=seed,
        holdout=prepared.holdout,
        holdout_valid=prepared.holdout_valid,
        sibling_runs=sibling_runs,
        on_epoch=on_epoch,
        start=start,
        label=label,
        shared=member and member.training,
        product=0 if member is None else member.index,
    )
    scorer, record = _calibrated(context, method(config.detector).fit(context), prepared)
    seconds = time.perf_counter() - began
    if training == directory:
        reference = saved.write_reference(config, prepared, training)
        saved.write_region(config, prepared.foreground, training)
    else:
        reference = saved.read_reference(training)
    thresholds = record(seed=seed, directory=directory, training=training, scored=scored)
    return Fitted(scorer, thresholds, reference, saved.read_places(directory), seconds)


def _calibrated(
    context: FitContext, scorer: Scorer, prepared: Prepared
) -> tuple[Scorer, Callable[..., dict]]:
    """Calibrates a scorer by cross-fitting and learns from labelled defects, where configured.

    Returns:
      The scorer, and `saved.record` for it.
    """
    cross_fitted = reweigh = None
    defects = _defects(scorer, prepared)
    if context.config.data.folds and prepared.holdout is None:
        parts = prepared.n_trained_on, prepared.groups
        scorer, cross_fitted = cross_fit(context, scorer, *parts, defects)
    elif defects is not None:
        scorer, reweigh = _learn(context, scorer, defects)
    how = {"cross_fitted": cross_fitted, "reweigh": reweigh}
    return scorer, functools.partial(saved.record, context.config, scorer, prepared, **how)


def _defects(scorer: Scorer, prepared: Prepared) -> Defects | None:
    """Location maps of the labelled defects, if there are any; see `labelled.check`."""
    if prepared.defects is None:
        return None
    assert isinstance(scorer, LocationScorer)
    maps = _location_maps(scorer, prepared.defects, prepared.defects_valid)
    return Defects(maps, np.asarray(scorer.calibration.weight))


def _learn(context: FitContext, scorer: Scorer, defects: Defects) -> tuple[Scorer, Reweigh | None]:
    """Learns the weights of a scorer from defects and the held-out images, and saves them.

    Returns:
      The scorer, and the function that learns its weights; None if the default ones are used.

    Raises:
      InputError: there are no held-out images, or too few of them or of the defects.
    """
    if context.holdout is None:
        raise InputError(
            "Learning from defects needs held-out normal images. Set config.data.holdout above 0."
        )
    assert isinstance(scorer, LocationScorer)
    normal = _location_maps(scorer, context.holdout, context.holdout_valid)
    if not choose(scorer, normal, defects):
        return scorer, None
    scorer = defects.reweighted(scorer, normal)
    save_again(scorer, context.directory)
    return scorer, defects.reweighted


def _location_maps(
    scorer: LocationScorer, features: Features, valid: np.ndarray | None
) -> tuple[np.ndarray, ...]:
    size = scorer.config.batch_size
    return in_batches(lambda part: scorer.location_maps(*part), (features, valid), size)
