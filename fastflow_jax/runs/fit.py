"""One fit: trains a detector on prepared features and records what `Detector.load` reads."""

import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

from fastflow_jax.detectors.base import Scorer, method
from fastflow_jax.evaluation.folds import cross_fit
from fastflow_jax.features.prepare import Prepared
from fastflow_jax.features.shift import Reference
from fastflow_jax.runs import saved
from fastflow_jax.runs.directory import check_same_data
from fastflow_jax.runs.products import Membership
from fastflow_jax.training.context import FitContext


class Fitted(NamedTuple):
    """A trained detector."""

    scorer: Scorer
    thresholds: dict  # plain, as in `results.json`
    reference: Reference | None  # for `shift.find`
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
      InputError: the images or the weights are not those that the training began with, or see
        `Method.fit`.
      Interrupted: SIGTERM or SIGINT was received; the same call continues the training.
    """
    training = training or directory
    for each in (directory, training, *(sibling for _, sibling in sibling_runs)):
        each.mkdir(parents=True, exist_ok=True)
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
    scorer, cross_fitted = method(config.detector).fit(context), None
    if config.data.folds and prepared.holdout is None:
        scorer, cross_fitted = cross_fit(context, scorer, prepared.n_trained_on, prepared.groups)
    seconds = time.perf_counter() - began
    if training == directory:
        reference = saved.write_reference(config, prepared, training)
    else:
        reference = saved.read_reference(training)
    thresholds = saved.record(
        config,
        scorer,
        prepared,
        seed=seed,
        directory=directory,
        training=training,
        scored=scored,
        cross_fitted=cross_fitted,
    )
    return Fitted(scorer, thresholds, reference, seconds)
